"""CLIP encoders, saliency, GRAB and the whole model. Pure: no data, files or meshes here."""
