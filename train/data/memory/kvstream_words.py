"""Words and sentences of generated streams."""

import random
from dataclasses import dataclass


def words_of(text: str) -> list[str]:
    """The items of a list with commas."""
    return [item.strip() for item in text.split(",")]


NAMES = words_of(
    "anna, bob, carl, dana, emil, fay, gus, hana, ivo, jan, kim, leo, mia, nils, olga, pat, quin, "
    "rosa, sam, tess, uma, vera, wim, xena, yara, zack, alma, boris, cleo, dirk, edda, finn, gita, "
    "hugo, ines, joel, kara, lars, maja, noel"
)
ATTRIBUTES = {
    "city": words_of(
        "rome, oslo, paris, lima, cairo, delhi, tokyo, berlin, quito, dakar, perth, malmo, turin, "
        "accra, hanoi, boston, porto, kyoto, riga, tunis"
    ),
    "pet": words_of(
        "cat, dog, fish, bird, horse, snake, rabbit, turtle, mouse, goat, parrot, ferret, pony, "
        "gecko, hen, lizard, duck, frog, crab, sheep"
    ),
    "job": words_of(
        "cook, nurse, baker, pilot, judge, actor, farmer, driver, teacher, tailor, lawyer, doctor, "
        "painter, singer, miner, editor, plumber, sailor, writer, guard"
    ),
    "food": words_of(
        "soup, rice, bread, pizza, salad, pasta, sushi, curry, tacos, beans, cheese, apples, stew, "
        "noodles, olives, eggs, figs, plums, corn, pie"
    ),
    "sport": words_of(
        "tennis, golf, rugby, chess, judo, boxing, hockey, skiing, rowing, diving, cycling, "
        "polo, karate, surfing, darts, squash, fencing, archery, curling, sailing"
    ),
    "color": words_of(
        "red, blue, green, black, white, pink, gray, brown, teal, gold, purple, orange, beige, "
        "navy, silver, violet, amber, coral, lime, ivory"
    ),
}
CLASSES = words_of(
    "weather, refund, transfer, login, billing, delivery, warranty, booking, travel, music, alarm, "
    "news, recipe, traffic, stocks, games"
)
SMALL_TALK = words_of(
    "it rained all day, the bus was late, what a long week, see you soon, thanks a lot, good "
    "morning all, the tea is cold, nice to hear it, let us talk later, that made me laugh, the "
    "train was full, so many emails today, sorry for the delay, the sun is out, hope you are well, "
    "no news so far, time flies, have a good one, the line was long, sounds fine to me"
)


class Wording:
    """Bare words, for models trained from nothing."""

    def state(self, draw: random.Random, entity: str, attribute: str, value: str) -> str:
        del draw
        return f"{entity} {attribute} {value}"

    def change(self, draw: random.Random, entity: str, attribute: str, value: str) -> str:
        del draw
        return f"{entity} {attribute} now {value}"

    def retract(self, draw: random.Random, entity: str, attribute: str, value: str) -> str:
        del draw, value
        return f"{entity} {attribute} gone"

    def ask(self, kind: str, entity: str, attribute: str, value: str) -> str:
        if kind == "previous":
            return f"previous {entity} {attribute}?"
        if kind == "count":
            return f"how many {attribute} {value}?"
        if kind == "same":
            return f"who has the same {attribute} as {entity}?"
        return f"{entity} {attribute}?"


@dataclass(frozen=True)
class Sentences(Wording):
    """Templates by attribute: `{e}` the name, `{v}` the value."""

    states: dict[str, tuple[str, ...]]
    changes: dict[str, tuple[str, ...]]
    retracts: dict[str, tuple[str, ...]]

    def state(self, draw: random.Random, entity: str, attribute: str, value: str) -> str:
        return _say(draw.choice(self.states[attribute]), entity, value)

    def change(self, draw: random.Random, entity: str, attribute: str, value: str) -> str:
        return _say(draw.choice(self.changes[attribute]), entity, value)

    def retract(self, draw: random.Random, entity: str, attribute: str, value: str) -> str:
        return _say(draw.choice(self.retracts[attribute]), entity, value)

    def ask(self, kind: str, entity: str, attribute: str, value: str) -> str:
        name = entity.capitalize()
        if kind == "previous":
            return f"What was {name}'s {attribute} before?"
        if kind == "count":
            return f"How many have the {attribute} {value}?"
        if kind == "same":
            return f"Who has the same {attribute} as {name}?"
        return f"What is {name}'s {attribute}?"


def _say(template: str, entity: str, value: str) -> str:
    text = template.replace("{e}", entity.capitalize()).replace("{v}", value)
    return text[0].upper() + text[1:]


_HELD = {
    "city": (
        ("{e} has settled in {v}.", "home for {e} is {v}."),
        ("{e} has relocated to {v}.", "{e} left and is in {v} these days."),
        ("{e} gave up the place in {v} and has no home now.",),
    ),
    "pet": (
        ("{e} adopted a {v}.", "there is a {v} at {e}'s place."),
        ("{e} swapped the old pet for a {v}.", "the pet of {e} is a {v} from today on."),
        ("{e} gave the {v} away and keeps no pet.",),
    ),
    "job": (
        ("{e} earns a living as a {v}.", "{e} was hired as a {v}."),
        ("{e} switched careers and became a {v}.", "{e} is a {v} these days."),
        ("{e} lost the job as a {v}.",),
    ),
    "food": (
        ("nothing beats {v} for {e}.", "{e} adores {v}."),
        ("{e} has come to prefer {v}.", "{e} now picks {v} over everything."),
        ("{e} is fed up with {v}.",),
    ),
    "sport": (
        ("{e} took up {v}.", "{e} trains for {v}."),
        ("{e} dropped the old sport for {v}.", "{e} trains for {v} instead."),
        ("{e} quit {v} for good.",),
    ),
    "color": (
        ("{e} is fond of {v}.", "{e} always wears {v}."),
        ("{e} is into {v} these days.", "{e} wears {v} from now on."),
        ("{e} has gone off {v}.",),
    ),
    "label": (
        ("a request about {e} belongs to label {v}.",),
        ("requests about {e} belong to label {v} from today on.",),
        ("requests about {e} have lost their label.",),
    ),
}
_TRAIN = {
    "city": (
        ("{e} lives in {v}.", "{e} is based in {v}.", "{e} has a flat in {v}.",
         "my friend {e} lives in {v}."),
        ("{e} moved to {v}.", "{e} now lives in {v}.", "{e} moved away and lives in {v} now."),
        ("{e} no longer lives in {v}.", "{e} left {v} and has no home.", "{e} moved out of {v}."),
    ),
    "pet": (
        ("{e} has a {v}.", "{e} got a {v}.", "{e} keeps a {v} at home.", "{e} owns a {v}."),
        ("{e} now has a {v} instead.", "{e} traded the pet for a {v}.",
         "{e} has a new pet, a {v}."),
        ("{e} no longer has a {v}.", "{e} sold the {v}.", "{e} lost the {v}."),
    ),
    "job": (
        ("{e} works as a {v}.", "{e} is a {v}.", "{e} got a job as a {v}.",
         "{e} started as a {v}."),
        ("{e} now works as a {v}.", "{e} changed jobs and is a {v} now.", "{e} became a {v}."),
        ("{e} no longer works as a {v}.", "{e} stopped being a {v}.", "{e} left work as a {v}."),
    ),
    "food": (
        ("{e} likes {v}.", "{e}'s favorite food is {v}.", "{e} loves {v}.", "{e} eats {v} a lot."),
        ("{e} now likes {v} best.", "{e}'s favorite food is now {v}.", "{e} prefers {v} now."),
        ("{e} no longer likes {v}.", "{e} stopped eating {v}.", "{e} is done with {v}."),
    ),
    "sport": (
        ("{e} plays {v}.", "{e} does {v}.", "{e} is good at {v}.", "{e}'s sport is {v}."),
        ("{e} now does {v} instead.", "{e} changed to {v}.", "{e}'s sport is now {v}."),
        ("{e} stopped doing {v}.", "{e} gave up {v}.", "{e} no longer does {v}."),
    ),
    "color": (
        ("{e} likes the color {v}.", "{e}'s favorite color is {v}.", "{e} chose {v}."),
        ("{e} now likes the color {v}.", "{e}'s favorite color is now {v}."),
        ("{e} no longer likes the color {v}.", "{e} is tired of {v}."),
    ),
    "label": (
        ("{e} questions get label {v}.", "this is about {e}, so the label is {v}."),
        ("{e} questions now get label {v}.", "the label of {e} changed to {v}."),
        ("{e} has no label any more.",),
    ),
}  # fmt: skip


def _sentences(table: dict[str, tuple[tuple[str, ...], ...]]) -> Sentences:
    states, changes, retracts = ({a: row[i] for a, row in table.items()} for i in range(3))
    return Sentences(states, changes, retracts)


NATURAL = {"train": _sentences(_TRAIN), "heldout": _sentences(_HELD)}
