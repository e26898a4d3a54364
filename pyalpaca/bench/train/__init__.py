"""`pyalpaca bench train`: whole training steps, beside transformers and beside the machine's own matrix products."""
