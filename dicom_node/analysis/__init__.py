"""The worker process: from stored images to labels, findings and result files."""
