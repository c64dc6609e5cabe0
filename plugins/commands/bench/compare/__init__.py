"""`penstock bench compare`: servers beside each other on one machine, in turns."""
