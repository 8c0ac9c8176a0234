"""The words of the demo world, and which of them training never sees.

A word is held out by a hash of itself, so the split needs no list and never moves.
"""

from __future__ import annotations

import functools
import hashlib

NAMES = """Ana Ben Carla David Elena Felix Grace Hugo Ivy Jonas Kira Liam Maya Noah Olga Pedro Quinn Rosa Samir Tara Uma
Victor Wendy Xavier Yara Zoe Aaron Bella Chen Dina Emil Farah Gita Hans Ines Jamal Karin Leo Mila Nora Oscar Paula
Ravi Sofia Tom Ursula Vera Walter Yusuf Zara Adele Boris Cleo Dante Edith Fiona Gustav Helen Igor Julia Kenji Laura
Marco Nadia Omar Petra Rita Stefan Theo Viola Wanda Anton Bruno Clara Derek Elsa Frida Greta Henrik Isla Jasper
Lukas Martha Nils Otto Pia Ralf Selma Timo Ulrich Vito Willa Amara Basil Cora Diego""".split()

PLACES = """Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Athens Prague Warsaw Zurich Milan Porto Geneva
Boston Denver Austin Seattle Chicago Dallas Toronto Montreal Havana Lima Bogota Quito Cairo Nairobi Lagos Accra Tunis
Mumbai Delhi Tokyo Osaka Kyoto Seoul Beijing Shanghai Bangkok Hanoi Jakarta Manila Sydney Perth Brisbane Auckland
Leeds Bristol York Oxford Bath Cardiff Glasgow Bergen Malmo Turin Naples Pisa Seville Bilbao Lyon Nice Ghent Bruges
Basel Bonn Ulm Graz Linz Split Sofia Riga Tallinn Vilnius Tartu Kaunas""".split()

THINGS = """milk bread eggs cheese butter rice pasta apples bananas tomatoes onions carrots coffee tea sugar flour salt
soap paper pens batteries candles flowers socks shoes gloves towels plates cups spoons chairs lamps books stamps tape
nails paint brushes rope buckets seeds pots honey olives lemons grapes peaches plums nuts beans lentils oats yogurt
cereal juice water cola cookies cake pizza soup salad chicken fish beef tofu spinach cabbage garlic pepper""".split()

TASK_VERBS = """call visit email thank pay buy clean fix water feed wash paint sell return collect check print sign
book cancel renew move open close lock charge update review finish send""".split()

TASK_OBJECTS = """the rent|the plants|the car|the cat|the dog|the kitchen|the garage|the report|the invoice|the tickets|the
window|the bike|the fence|the passport|the contract|the garden|the oven|the roof|the parcel|the keys|the laptop|the
phone|the boxes|the essay|the slides|the budget|the form|the letter|the lights|the printer""".replace("\n", " ").split(
    "|"
)

TOPIC_WORDS = """spring summer winter autumn budget travel family music history garden science school health sports weekly
monthly annual secret final draft blue green golden silver quiet happy rainy early late local global modern ancient
simple double royal urban coastal mountain river forest desert island winter market coffee kitchen studio planning
reading painting running cooking design review lunch dinner team project sales research safety training birthday
wedding holiday meeting concert workshop lecture festival journey story guide notes ideas plan report party""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow tonight".split()
COLORS = "red blue green yellow black white orange purple pink brown gray teal".split()
LANGUAGES = (
    "French German Spanish Italian Dutch Polish Greek Arabic Hindi Korean Japanese Turkish Swedish Danish".split()
)

# Tool names are verb_noun; a request may name the action by any of the phrases.
VERBS = {
    "create": ("create", "make", "set up"),
    "add": ("add", "put in", "insert"),
    "delete": ("delete", "remove", "get rid of"),
    "update": ("update", "change", "edit"),
    "find": ("find", "look for", "search for"),
    "get": ("get", "fetch", "show me"),
    "list": ("list", "show all", "enumerate"),
    "send": ("send", "dispatch", "forward"),
    "book": ("book", "reserve", "arrange"),
    "cancel": ("cancel", "call off", "drop"),
    "start": ("start", "begin", "launch"),
    "stop": ("stop", "end", "halt"),
    "order": ("order", "buy", "purchase"),
    "open": ("open", "unlock", "bring up"),
    "close": ("close", "shut", "lock"),
    "move": ("move", "shift", "relocate"),
    "copy": ("copy", "duplicate", "clone"),
    "share": ("share", "pass on", "hand out"),
    "check": ("check", "inspect", "verify"),
    "rename": ("rename", "relabel", "retitle"),
    "print": ("print", "print out", "make a printout of"),
    "archive": ("archive", "file away", "store away"),
    "assign": ("assign", "give out", "allocate"),
    "schedule": ("schedule", "plan", "put on the calendar"),
    "approve": ("approve", "accept", "sign off on"),
    "reject": ("reject", "decline", "turn down"),
    "rate": ("rate", "score", "grade"),
    "track": ("track", "follow", "trace"),
    "upload": ("upload", "push up", "submit"),
    "download": ("download", "pull down", "save"),
    "translate": ("translate", "render", "convert"),
    "measure": ("measure", "gauge", "take a reading of"),
    "repair": ("repair", "fix", "mend"),
    "lend": ("lend", "loan", "loan out"),
    "mute": ("mute", "silence", "quiet"),
    "paint": ("paint", "color", "coat"),
}

NOUNS = """account album alarm appointment article auction badge banner basket bicycle bill boat bookmark bottle bridge
bundle cabin calendar camera canvas card carpet channel chapter charger clinic clock coach comment contract coupon
course court crate crew cruise customer dashboard deposit desk device dish document donation door drone engine event
exam exhibit fabric factory ferry file filter flight folder forecast form fountain game garage garden gate gift goal
guitar hall helmet hotel invoice issue journal kayak kettle ladder lamp lease lesson library license loan locker
machine magazine map meal medal memo menu mirror mission monitor museum newsletter notebook orchard order oven package
painting parcel parking partner passport patient payment photo piano playlist podcast poem policy pool poster
prescription printer profile project pump puzzle quiz quote rack radio recipe refund report request robot room route
sample scanner sculpture sensor server shelf shipment shop signal sketch sofa song speaker stage statue stove
student survey table tank task taxi team telescope tent theater ticket token tournament toy tractor train trophy truck
tunnel vaccine van vase vehicle video violin voucher wallet warehouse watch website window workout yacht zone""".split()

SYLLABLES = "ba be bi bo da de do fa fe fi ga go ka ke ki ko la le li lo ma me mi mo na ne ni no pa po ra re ri ro sa se si so ta te ti to va ve vi vo za zo".split()
ENDINGS = ("", "", "", "n", "l", "s", "r", "k", "m", "x")


@functools.cache
def held_out(word: str, *, salt: str = "", share: float = 0.2) -> bool:
    """Whether training never sees this word (as that kind of thing, named by ``salt``)."""
    digest = hashlib.sha256(f"{salt}:{word}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


def pool(words: list[str] | tuple[str, ...], *, salt: str, unseen: bool, share: float = 0.2) -> list[str]:
    """The training part of a word list, or with ``unseen`` the held-out part."""
    return [word for word in words if held_out(word, salt=salt, share=share) == unseen]
