"""``lmkv doctor``: looks for what goes wrong in the field, and names the next step."""
