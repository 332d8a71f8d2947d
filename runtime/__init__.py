"""A model bundle and slices in Hounsfield units in; labels, findings and a triage decision out.

numpy and an inference engine, nothing else: no pydicom, no torch, no patient data.
"""
