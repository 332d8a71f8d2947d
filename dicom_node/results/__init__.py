"""Findings as DICOM: SEG, SR, Secondary Captures and PDF, and the pictures in them."""
