"""The main job on a real pretrained model, offline."""
