"""Data: benchmark records, CLIP's tokenizer, augmentation and the input pipeline.

Nothing is imported here on purpose: `records`, `tokenizer` and `transforms` work without Grain.
"""
