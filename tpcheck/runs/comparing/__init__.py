"""`compare`: where two recorded runs first part, and whether that is rounding or a mistake."""
