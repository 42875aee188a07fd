"""Why each setting of a run is what it is, or what it does: a line beside it in the report."""

from cellseg.presets import TABLE

REASONS = {row[0]: row[-1] for row in TABLE} | {
    # the model
    "num_classes": "those of the cells, and background",
    "anchor_sizes": "network pixels; the usual 32 to 512 are larger than most nuclei",
    "norm": "which batch norms learn; batches are small, so loaded statistics stay",
    "trainable_stages": "of the backbone that learn, from its end: tissue is no photograph",
    "rpn_samples": "anchors of a crop that the proposals' loss sees",
    "box_roi_size": "bins a side that the box head sees of a box",
    "mask_roi_size": "bins a side for the mask head; its mask has twice as many pixels a side",
    "mask_layers": "convolutions of the mask head",
    "class_masks": "a mask for each class; if not, one that learns from the cells of all classes",
    "proposals": "for each megapixel of an image; a cell without a proposal is lost",
    "detections_per_image": "an image holds hundreds of cells; COCO's usual 100 would lose them",
    "cascade": "three box heads in a row, each for tighter boxes",
    "mask_quality": "power of the mask's sureness in the score; 0 leaves scores as they are",
    "score_threshold": "low: AP gains from unsure cells, and sorting does the rest",
    "nms_threshold": "box IoU over which two detections of a class are one cell",
    "seed": "of the weights that are drawn at random",
    # what it sees
    "crop_size": "image pixels a side; images differ in size, crops do not",
    "scale_range": "of magnification: cells come in many sizes",
    "flip": "with quarter turns: tissue has no up and no left",
    "crowded": "share of crops laid about a cell; the others lie anywhere",
    "stain": "change of the two stains: laboratories stain differently",
    "color": "change of brightness and colour: so do scanners",
    "min_visible": "share of a cell in the crop; of less there is nothing to learn",
    # how it learns
    "weight_decay": "of kernels and matrices, not of norms and biases: keeps them small",
    "warmup": "share of the run in which the learning rate rises: the first gradients are wild",
    "clip_norm": "longer gradients are cut to it, so that no odd batch throws the weights",
    "ema_decay": "averaged weights are steadier than the last ones",
    "accumulate": "batches added up for one step",
    "probe_images": "training images that are scored, too, to see overfitting",
    "precision": "auto: half where the device is faster with it",
    # how it looks at images
    "scales": "sizes of the image at which it is looked at",
    "mask_threshold": "a pixel is the cell's if its probability is greater",
    "iou_threshold": "mask IoU over which two records show one cell",
    "tile_size": "image pixels a side; none: only very large images are cut",
    "overlap": "image pixels that tiles share: larger than a cell",
    "mix_whole": "the whole image beside its tiles",
}
