"""A color for each method, the same in every picture; related methods have related ones.

Red is left to the masked weights, in the library's plots, too.
"""

COLORS = {
    "dense": "0.4",
    "scratch": "tab:orange",
    "scratch-ERK": "goldenrod",
    "scratch-scaled": "tab:brown",
    "scratch-short": "burlywood",
    "L1": "tab:green",
    "GMP": "yellowgreen",
    "GMP-early": "olive",
    "LTH": "tab:purple",
    "LTH-iter": "mediumpurple",
    "random-after-dense": "0.6",
    "L1-RST": "darkcyan",
    "L1-RST-norm": "turquoise",
    "GMP-RST": "tab:pink",
    "RST": "tab:blue",
    "RST-ERK": "navy",
    "RST-iter": "skyblue",
}
