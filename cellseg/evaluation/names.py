"""What scores are called: by the keys of files and options, and in tables and figures."""

AP_NAMES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_100": "AP at 100",
    "ap50_100": "AP50 at 100",
    "ap75_100": "AP75 at 100",
}
NUCLEI_NAMES = {"pq": "PQ", "dq": "DQ", "sq": "SQ", "aji": "AJI", "dice": "Dice", "f_d": "F_d"}
SCORE_NAMES = AP_NAMES | NUCLEI_NAMES
AP_SHOWN = ("ap50", "ap75", "ap", "ap50_100", "ap_100")
"""The APs that are given with an interval, in this order."""
