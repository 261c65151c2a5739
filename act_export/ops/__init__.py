"""The calibrated attention operator: schema, portable function bodies and native library."""
