"""Weight formats, layer sensitivity and calibration."""
