"""Pictures and captions: found, checked, and put together to batches."""
