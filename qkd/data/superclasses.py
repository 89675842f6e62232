"""The superclasses of CIFAR-100 by class name: a published table, so that no label file needs to be opened."""

from __future__ import annotations

from collections.abc import Sequence

# Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, and the data set's page
# (https://www.cs.toronto.edu/~kriz/cifar.html), with the class names as its files and torchvision spell them.
CIFAR100_SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


def superclasses(classes: Sequence[str]) -> tuple[int, ...] | None:
    """Return the superclass number of each class; None if the classes are not those of CIFAR-100.

    Args:
        classes: Class names: all of CIFAR-100's, or some of them (a folder of its images).

    Returns:
        One number (0 to 19, in the published order) per class. Also None if no two classes share a superclass, or all
        of them do, so that there is nothing to distinguish.

    Example:
        >>> superclasses(["cloud", "wolf", "sea", "bear"])
        (10, 8, 10, 8)
        >>> superclasses(["0", "1", "2"]) is None
        True
    """
    number = {name: index for index, names in enumerate(CIFAR100_SUPERCLASSES.values()) for name in names}
    if any(name not in number for name in classes):
        return None
    groups = tuple(number[name] for name in classes)
    return groups if 1 < len(set(groups)) < len(groups) else None
