"""COCO files, checked field by field: annotations, masks, detections, the ground truth of an evaluation."""
