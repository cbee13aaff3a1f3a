"""Many more words and sentences for the training split of generated streams (`style: wide`).

Twenty-seven names and a few sentences a fact (kvstream_words.py) teach a pretrained model to answer
with one of them: on the held-out split, which is the natural style's, it writes `zinc` for `Carl`.
Here are words enough that copying is the easier rule, and sentences enough that the meaning is.
"""

import random

from mnemic.train.data.memory.kvstream_words import NATURAL, Sentences, words_of

NAMES = words_of(
    "aaron, abby, adam, agnes, aiko, alan, albert, alice, amir, amy, andrei, angela, anton, april, "
    "arjun, astrid, bella, ben, bertha, bianca, brian, bruno, camila, carmen, "
    "casper, celine, chen, "
    "chloe, clara, colin, cora, cyrus, daisy, damian, daniel, david, deepa, della, diego, dora, "
    "edgar, eli, elsa, emma, enzo, erik, esther, ethan, eva, fatima, felix, fiona, frank, freya, "
    "gary, george, gina, greta, hannah, harry, hector, helen, henry, hilda, ian, ida, igor, imran, "
    "iris, isaac, ivy, jack, jane, jasper, jenny, jonas, judy, julia, kai, karen, katya, kevin, "
    "klaus, laura, layla, lena, liam, lily, linus, lola, lucas, lucy, magnus, marco, "
    "maria, martha, "
    "matteo, max, megan, milo, mona, nadia, nathan, nell, nick, nina, nora, omar, oscar, otto, "
    "pablo, paula, pedro, petra, phil, priya, rafael, ralph, rita, robin, ruth, sana, sean, selma, "
    "simon, sofia, stella, sven, tara, theo, tim, tina, tom, ursula, victor, viola, walter, wendy, "
    "will, yusuf, yuki, zara, zoe"
)
VALUES = {
    "city": words_of(
        "london, madrid, vienna, athens, lisbon, dublin, prague, warsaw, zurich, geneva, milan, "
        "naples, seoul, osaka, sydney, chicago, denver, dallas, miami, havana, bogota, nairobi, "
        "lagos, mumbai, bangkok, manila, jakarta, tehran, baghdad, damascus, helsinki, lyon"
    ),
    "pet": words_of(
        "hamster, puppy, kitten, rat, canary, pig, donkey, llama, spider, hedgehog, pigeon, owl, "
        "swan, goose, otter, monkey, beetle, toad, newt, lamb, tortoise, cow, camel, budgie"
    ),
    "job": words_of(
        "chef, clerk, dentist, gardener, barber, butcher, carpenter, cashier, chemist, coach, "
        "librarian, mechanic, waiter, welder, surgeon, soldier, tutor, vet, banker, poet, dancer, "
        "reporter, florist, grocer, porter, sculptor"
    ),
    "food": words_of(
        "steak, ham, honey, garlic, onions, peas, carrots, potatoes, tomatoes, mushrooms, yogurt, "
        "pancakes, waffles, burgers, dumplings, lentils, oats, tofu, shrimp, salmon, "
        "tuna, berries, "
        "mangoes, bananas, peaches, melons, nuts, chocolate, toast, porridge"
    ),
    "sport": words_of(
        "football, basketball, baseball, volleyball, cricket, badminton, wrestling, swimming, "
        "running, climbing, yoga, sumo, lacrosse, bowling, snooker, sprinting, skating, sledding, "
        "handball, canoeing, gymnastics"
    ),
    "color": words_of(
        "crimson, maroon, scarlet, turquoise, magenta, cyan, indigo, mauve, khaki, mustard, cream, "
        "charcoal, bronze, copper, lavender, emerald, ruby, jade, tan, yellow, sand, rose"
    ),
}
SMALL_TALK = words_of(
    "my phone died again, did you watch the match, the garden looks great, we should catch up, i "
    "overslept this morning, the coffee was strong, traffic was awful, it is getting dark early, "
    "that movie was dull, my back hurts today, who left the door open, we ran out of milk, the "
    "meeting took forever, i need a holiday, the wifi is down, good luck tomorrow, it might snow "
    "later, lunch was late, the elevator broke, what a lovely photo, i forgot my umbrella, call me "
    "when you can, the music was loud, congrats on the news, it was worth the wait, same time next "
    "week, the printer is jammed, such a quiet evening, dinner smells good, the flight was "
    "canceled, please pass the salt, how was the trip, the shop was closed, i could "
    "not agree more, "
    "everyone is busy, the lights went out, that was a close call, happy birthday to you, my inbox "
    "is full, this chair is wobbly, see you on monday, the queue moved fast, thank you for the "
    "help, what a view, i lost my keys, it smells of rain, nobody answered the bell, another busy "
    "month, two meetings got moved, we had a blast, the weekend was short, all is well here"
)
_MORE = {
    "city": (
        ("{e} resides in {v}.", "{e} rents a room in {v}.", "you can find {e} in {v}.",
         "the address of {e} is in {v}.", "{e} has a house in {v}.",
         "{v} is where {e} lives.", "the house of {e} is in {v}."),
        ("{e} packed up and went to live in {v}.", "{e} traded the old town for {v}.",
         "{e}'s new address is in {v}.", "{e} lives in {v} instead.",
         "{e} went over to {v} to live.", "{e} left the old place for {v}."),
        ("{e} does not live in {v} any more.", "{e} sold the flat in {v} and has no address.",
         "{e} lost the room in {v}.", "{v} is no longer where {e} lives.",
         "{e} gave back the keys in {v} and lives nowhere now."),
    ),
    "pet": (
        ("{e} looks after a {v}.", "{e} feeds a {v} every day.", "a {v} lives with {e}.",
         "{e} brought home a {v}.", "{e} bought a {v}.",
         "the {v} in the yard belongs to {e}.", "there is now a {v} in the home of {e}."),
        ("{e} has a {v} in place of the old pet.", "{e} replaced the pet with a {v}.",
         "{e}'s pet is a {v} now.", "{e} now looks after a {v}.",
         "{e} let the old pet go for a {v}."),
        ("{e} has no {v} any more.", "the {v} of {e} ran away.",
         "{e} found a new owner for the {v}.", "{e} gave up the {v}."),
    ),
    "job": (
        ("{e} is employed as a {v}.", "{e} makes money as a {v}.", "{e}'s profession is {v}.",
         "by trade {e} is a {v}.", "{e} found work as a {v}.",
         "the new {v} at work is {e}.", "they took on {e} as a {v}."),
        ("{e} left the old job to be a {v}.", "{e} is now employed as a {v}.",
         "{e} took a new job as a {v}.", "{e} retrained and works as a {v}.",
         "{e} quit the old job for that of a {v}."),
        ("{e} was fired as a {v}.", "{e} is not a {v} any more.", "{e} retired as a {v}.",
         "{e} quit working as a {v}.", "they let {e} go as a {v}."),
    ),
    "food": (
        ("{e} could eat {v} all day.", "{e} orders {v} every time.", "{e} is crazy about {v}.",
         "{v} is what {e} likes to eat.", "{e} cannot get enough of {v}.",
         "{v} makes a good dinner for {e}.", "the best dish for {e} is {v}."),
        ("{e} switched to {v} at meals.", "these days {e} eats {v}.",
         "{e} has a new favorite dish, {v}.", "{e} would rather have {v} now.",
         "{e} left the old dish for {v}."),
        ("{e} cannot stand {v} now.", "{e} has had enough of {v}.",
         "{e} does not eat {v} any more.", "{e} is sick of {v}.", "{v} is off the menu for {e}.",
         "{e} has gone cold on {v}."),
    ),
    "sport": (
        ("{e} practices {v} every week.", "{e} joined a {v} club.",
         "{e} spends weekends on {v}.", "{e} goes in for {v}.", "{e} began {v}.",
         "{v} is the sport of {e}.", "on sundays {e} goes for {v}."),
        ("{e} swapped the old sport for {v}.", "{e} now practices {v}.",
         "{e} started {v} in place of the old sport.", "{e} does {v} these days.",
         "{e} gave the old sport up for {v}.", "{e} left the old sport for {v}."),
        ("{e} has left the {v} club.", "{e} does not practice {v} any more.",
         "{e} is through with {v}.", "{e} gave {v} up altogether.",
         "no more {v} for {e}."),
    ),
    "color": (
        ("{e} paints everything {v}.", "{e} dresses in {v}.", "{e} picks {v} for every wall.",
         "{v} is the color {e} loves.", "{e} goes for {v}.",
         "the walls of {e} are {v}.", "nothing but {v} suits {e}."),
        ("{e} changed the favorite color to {v}.", "{e} dresses in {v} now.",
         "{e}'s new color is {v}.", "{e} goes for {v} now.",
         "{e} turned from the old color to {v}."),
        ("{e} does not care for {v} any more.", "{e} stopped wearing {v}.", "{e} is over {v}.",
         "{e} dislikes {v} now.", "{v} no longer suits {e}.",
         "{e} has turned away from {v}."),
    ),
}  # fmt: skip
_ONSETS = words_of(
    "b, c, d, f, g, h, j, k, l, m, n, p, r, s, t, v, w, z, br, cl, dr, fl, gr, kr, pl, sh, st, th"
)
_VOWELS = words_of("a, e, i, o, u, ai, ea, ie, oo")
_CODAS = ("", "", "", "l", "n", "r", "s", "t", "m", "nd", "x")


def wording() -> Sentences:
    """The natural training sentences and more."""
    own = NATURAL["train"]
    tables = [dict(table) for table in (own.states, own.changes, own.retracts)]
    for attribute, more in _MORE.items():
        for table, extra in zip(tables, more, strict=True):
            table[attribute] = (*table[attribute], *extra)
    return Sentences(*tables)


WORDING = wording()


def names(pool: list[str], count: int, draw: random.Random) -> list[str]:
    """`count` names: of `pool` (the natural training split's), of many more, and made up."""
    found: dict[str, None] = {}
    while len(found) < count:
        at = draw.random()
        found[draw.choice(pool if at < 0.2 else NAMES) if at < 0.7 else made_up(draw)] = None
    return list(found)


def values(pool: list[str], attribute: str, count: int, draw: random.Random) -> list[str]:
    """`count` values at most. Real words: what a sentence is about may be told by them alone."""
    return draw.sample([*pool, *VALUES[attribute]], min(count, len(pool) + len(VALUES[attribute])))


def made_up(draw: random.Random) -> str:
    """Two or three syllables, such as `stalden`."""
    syllables = draw.choice((2, 2, 3))
    return "".join(
        draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS) for _ in range(syllables)
    )
