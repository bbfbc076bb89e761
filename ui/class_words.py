"""Everyday words for classes of ImageNet-1k, whose names are species and makes: "dog" finds a Golden Retriever."""

from collections.abc import Mapping
from functools import cache

from dsd_serve.labels import all_classes

# The indices of each word; ImageNet-1k is sorted by kind.
WORDS = {
    "animal": "0-397",
    "fish": "0-6 389-397",
    "shark": "2-4",
    "bird": "7-24 80-100 127-146",
    "chicken": "7-8",
    "duck": "97-98",
    "parrot": "87-90",
    "amphibian": "25-32",
    "frog": "30-32",
    "toad": "30-32",
    "reptile": "33-68",
    "turtle": "33-37",
    "lizard": "38-48",
    "crocodile": "49-50",
    "dinosaur": "51",
    "snake": "52-68",
    "spider": "72-77",
    "bug": "69-79 300-326",
    "crab": "118-121",
    "lobster": "122-124",
    "whale": "147-148",
    "seal": "149-150",
    "mammal": "102-106 147-299 330-388",
    "dog": "151-268",
    "puppy": "151-268",
    "wolf": "269-272",
    "fox": "277-280",
    "cat": "281-293",
    "kitten": "281-285",
    "bear": "294-297",
    "insect": "300-326",
    "beetle": "300-307",
    "bee": "309",
    "butterfly": "321-326",
    "rabbit": "330-332",
    "bunny": "330-332",
    "rodent": "333-338",
    "mouse": "673",
    "horse": "339-340",
    "pig": "341-343",
    "cow": "345-347",
    "sheep": "348-349",
    "deer": "351-353",
    "camel": "354-355",
    "ape": "365-369",
    "monkey": "365-384",
    "elephant": "385-386",
    "panda": "387-388",
    "vehicle": "403-404 407 408 436 444 466 468 511 547 555 565 569 609 627 654 656 661 665 670 671 675 705 717 734 "
    "751 779 817 820 829 864 867 874 895",
    "car": "407 436 468 511 609 627 656 661 717 734 751 817",
    "taxi": "468",
    "bus": "654 779 874",
    "truck": "555 569 675 717 864 867",
    "train": "466 547 565 705 820 829",
    "boat": "472 484 554 576 625 628 724 780 814 871 914",
    "ship": "403 484 510 554 625 628 724 780 833 871 914",
    "plane": "404 895",
    "airplane": "404 895",
    "bike": "444 671",
    "bicycle": "444 671",
    "motorcycle": "665 670",
    "instrument": "401 402 420 432 486 513 541 546 558 566 577 579 593 594 642 683 684 687 699 776 822 875 881 889",
    "guitar": "402 546",
    "piano": "579 881",
    "house": "425 449 580 660 663 668 698",
    "building": "425 437 449 483 497 580 624 663 668 698 727 743 762 832 900",
    "church": "497 663 668",
    "tower": "437 900",
    "bridge": "821 839 888",
    "furniture": "423 453 495 526 532 559 564 765 831 857 894",
    "chair": "423 559 765 857",
    "sofa": "831",
    "couch": "831",
    "bed": "516 520 564",
    "table": "526 532 736",
    "lamp": "619 818 846",
    "clothes": "399 411 445 459 474 501 568 578 601 608 610 614 617 652 655 735 775 834 841 842 869 887",
    "dress": "578 601 614",
    "coat": "568 617 869",
    "hat": "433 439 452 515 808",
    "shoe": "502 514 630 770 774",
    "ball": "429 430 522 574 722 768 805 852 890",
    "football": "805",
    "food": "924-969",
    "vegetable": "936-947",
    "fruit": "948-957",
    "apple": "948",
    "bread": "930-932",
    "burger": "933",
    "dessert": "927-929",
    "drink": "966-969",
    "wine": "907 966",
    "coffee": "504 505 550 967 968",
    "landscape": "970-980",
    "mountain": "970 972 979 980",
    "beach": "976-978",
    "sea": "973 976-978",
    "lake": "975",
    "flower": "984-986",
    "mushroom": "947 991-997",
}


@cache
def by_wnid() -> Mapping[str, tuple[str, ...]]:
    """The words for a class by its wnid."""
    found: dict[str, list[str]] = {}
    classes = all_classes()
    for word, ranges in WORDS.items():
        for part in ranges.split():
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                found.setdefault(classes[index].wnid, []).append(word)
    return {wnid: tuple(words) for wnid, words in found.items()}


def words_for(wnid: str) -> tuple[str, ...]:
    return by_wnid().get(wnid, ())
