"""`penstock doctor`: what stands between a server and its clients, and what to do about it."""
