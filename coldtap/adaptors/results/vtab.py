"""The 19 datasets of VTAB-1K (arXiv 1910.04867), their groups, and the spellings under which they go."""

import re

GROUPS: dict[str, tuple[str, ...]] = {
    "Natural": ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "Specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "Structured": (
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ),
}

# Letters and digits alone, as names differ in the rest; each name is a spelling of its own.
_SPELLINGS = {
    "caltech101": ["caltech"],
    "cifar": ["cifar100", "cifarnumclasses100"],
    "dtd": ["describabletextures"],
    "oxford_flowers102": ["flowers102", "flowers", "oxfordflowers"],
    "oxford_iiit_pet": ["oxfordiiitpets", "oxfordpet", "oxfordpets", "pet", "pets"],
    "svhn": ["svhncropped"],
    "sun397": ["sun"],
    "patch_camelyon": ["camelyon", "pcam"],
    "resisc45": ["resisc"],
    "diabetic_retinopathy": ["retinopathy", "diabeticretinopathydetection"],
    "clevr_count": ["clevrcountall", "clevrcounts"],
    "clevr_dist": ["clevrdistance", "clevrclosestobjectdistance"],
    "kitti": ["kittidist", "kittidistance", "kitticlosestvehicledistance"],
    "dsprites_loc": ["dspriteslocation", "dspritesposition", "dspriteslabelxposition"],
    "dsprites_ori": ["dspritesorientation", "dspriteslabelorientation"],
    "smallnorb_azi": ["smallnorbazimuth", "smallnorblabelazimuth"],
    "smallnorb_ele": ["smallnorbelevation", "smallnorblabelelevation"],
}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_NAMES = {
    spelling: name
    for names in GROUPS.values()
    for name in names
    for spelling in (_letters(name), *_SPELLINGS.get(name, []))
}
_ORDER = [name for names in GROUPS.values() for name in names]


def vtab_name(dataset: str) -> str | None:
    """Return the name in `GROUPS` of a dataset, however it is spelt; None where it is none of VTAB-1K."""
    return _NAMES.get(_letters(dataset))


def in_vtab_order(datasets: list[str]) -> list[str] | None:
    """Return datasets in the order of VTAB's tables; None unless all are of VTAB-1K, each once."""
    names = [vtab_name(dataset) for dataset in datasets]
    if None in names or len(set(names)) < len(names):
        return None
    return sorted(datasets, key=lambda dataset: _ORDER.index(vtab_name(dataset) or ""))
