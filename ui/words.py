"""Error messages for the page: the API's parameter names are replaced by the labels of the controls."""

import re

# The API's name -> the label on the page.
LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "Guidance",
    "guidance_start": "Guidance start",
    "guidance_stop": "Guidance stop",
    "strength": "Strength",
    "seed": "Seed",
    "index": "Index",
    "n": "Images",
    "class": "Class",
    "from.class": "From",
    "to.class": "To",
}
# A sentence of the API begins with the names of its parameters: "guidance_start and guidance_stop must be".
NAMES = "|".join(re.escape(name) for name in sorted(LABELS, key=len, reverse=True))
FIRST = re.compile(rf"(?:{NAMES})(?=,? (?:and |or |must |in the link ))(?: and (?:{NAMES})(?= must ))?")


def in_page_words(error: Exception | str) -> str:
    """The sentence of an error, with the labels of the page in place of the API's names."""
    sentence = str(error)
    found = FIRST.match(sentence)
    if found is None:
        return sentence
    words = " and ".join(LABELS[name] for name in found[0].split(" and "))
    return words + sentence[found.end() :]
