"""`penstock quantize` and `penstock quant report`: fewer bits for a checkpoint, and what they cost."""
