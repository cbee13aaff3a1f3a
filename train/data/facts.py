"""Dialogue turns and the facts worth remembering from them: training data for one memory operation.

A row asks for the *extract* operation of a Mem0-style memory (the first of MemLoRA's three experts,
arXiv 2512.04763): in, one chat turn with its speaker; out, a JSON list of third-person facts, and
``[]`` when there is nothing to keep.

    Maya: Morning! I moved to Lisbon after college.   ->   ["Maya lives in Lisbon"]

Targets are scripted, not written by a teacher model, so a right answer is one string and exact
match is a fair score. The splits share the relations and how each is worded in the answer, and
nothing else: speakers, relatives, values, sentences and small talk are disjoint, since each is
written twice below. A model that does well on ``heldout`` rewrites sentences that it never saw
about things that it never saw.
"""

from __future__ import annotations

import json
import random
from itertools import product
from typing import Literal, NamedTuple, TypedDict

Split = Literal["train", "heldout"]

FACTS_SYSTEM = "List the facts about the speaker as JSON."


class Message(TypedDict):
    role: str
    content: str


class FactsRow(TypedDict):
    """A conversational prompt/completion row: the turn, and the JSON list wanted for it."""

    prompt: list[Message]
    completion: list[Message]


class Relation(NamedTuple):
    """One kind of fact in one split; ``{k}`` and ``{v}`` stand for a value's two parts."""

    target: str  # follows the speaker's name in the answer
    values: tuple[tuple[str, str], ...]  # (kind or "", value)
    sentences: tuple[str, ...]


class Tables(NamedTuple):
    """Everything that one split draws from. The first relation's values are its cities."""

    relations: tuple[Relation, ...]
    speakers: tuple[str, ...]
    greetings: tuple[str, ...]
    asides: tuple[str, ...]  # carry nothing to remember
    questions: tuple[str, ...]  # name a city and state nothing: a city in a turn is not yet a home
    links: tuple[str, ...]  # between two facts


def facts_rows(split: str, size: int, seed: int = 0) -> list[FactsRow]:
    """``size`` different rows of ``split`` ("train" or "heldout"), the same for the same arguments.

    A third of the turns hold no fact, a fifth hold two and the rest one. A larger ``size``
    continues the list of a smaller one. No turn occurs in both splits, whatever their seeds: a turn
    starts with its speaker's name.

    Raises:
        ValueError: an unknown split, a negative size, or more rows than ``capacity(split)``.
    """
    most = capacity(split)
    if not 0 <= size <= most:
        raise ValueError(f"size must be from 0 to {most} for the split {split!r}, got {size}")
    rng, tables = random.Random(f"{split} {seed}"), TABLES[split]
    turns: dict[str, list[str]] = {}
    while len(turns) < size:
        turn, facts = _turn(rng, tables)
        turns.setdefault(turn, facts)
    return [
        {
            "prompt": [{"role": "user", "content": turn}],
            "completion": [{"role": "assistant", "content": json.dumps(facts)}],
        }
        for turn, facts in turns.items()
    ]


def capacity(split: str) -> int:
    """The most rows ``facts_rows`` gives: the number of bare one-fact turns of the split.

    There are many times more turns than that, so drawing without repeats stays quick up to here.
    """
    if split not in TABLES:
        raise ValueError(f"split must be one of {', '.join(TABLES)}, got {split!r}")
    tables = TABLES[split]
    facts = sum(len(relation.values) * len(relation.sentences) for relation in tables.relations)
    return len(tables.speakers) * facts


def _turn(rng: random.Random, tables: Tables) -> tuple[str, list[str]]:
    name = rng.choice(tables.speakers)
    count = rng.choices((0, 1, 2), weights=(7, 9, 4))[0]
    before, after = rng.sample(tables.asides, 2)
    if rng.random() < 0.15:
        before = _say(rng.choice(tables.questions), *rng.choice(tables.relations[0].values))
    talk = (1.0, 0.25, 0.0)[count]
    parts = [rng.choice(tables.greetings)] if rng.random() < 0.3 else []
    if rng.random() < talk:
        parts.append(before)
    facts: list[str] = []
    for index, relation in enumerate(rng.sample(tables.relations, count)):
        kind, value = rng.choice(relation.values)
        sentence = rng.choice(relation.sentences)
        link = rng.choice(tables.links) if index and rng.random() < 0.4 else ""
        parts.append(_say(sentence, kind, value, link))
        facts.append(name + _fill(relation.target, kind, value))
    if rng.random() < talk / 2:
        parts.append(after)
    return f"{name}: {' '.join(parts)}", facts


def _say(sentence: str, kind: str, value: str, link: str = "") -> str:
    if link and not sentence.startswith(("I ", "I'")):
        sentence = sentence[0].lower() + sentence[1:]
    text = f"{link} {_fill(sentence, kind, value)}".strip()
    return text[0].upper() + text[1:]


def _fill(text: str, kind: str, value: str) -> str:
    return text.replace("{k}", kind).replace("{v}", value)


def _items(text: str, separator: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split(separator))


def _values(text: str) -> tuple[tuple[str, str], ...]:
    """``a, b`` have no kind; ``k, l: a, b; m: c`` pairs k and l with a and b."""
    pairs: list[tuple[str, str]] = []
    for group in text.split(";"):
        kinds, _, values = group.rpartition(":")
        pairs += product(_items(kinds, ","), _items(values, ","))
    return tuple(pairs)


# Wording of the fact; then values and sentences of train, then values and sentences of heldout.
_FACTS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        " lives in {v}",
        """Lisbon, Denver, Oslo, Kyoto, Toronto, Glasgow, Austin, Seville, Boston, Prague, Nairobi,
        Lyon, Seattle, Warsaw, Perth, Atlanta, Bogota, Helsinki, San Diego, New Orleans, Cape Town,
        Tel Aviv, Leeds, Zagreb, Manila""",
        """I live in {v}. / I've been living in {v} for a few years now. / I'm based in {v} these
        days. / We moved to {v} last spring and we love it. / My apartment is in {v}, close to the
        station. / I just bought a small place in {v}. / I moved to {v} after college and never
        left. / These days home is {v}. / I finally settled down in {v}. / I've got a flat in {v}
        now. / We're still in {v}, same street as before. / My house in {v} is tiny but cozy.""",
        """Dublin, Chicago, Vienna, Osaka, Porto, Montreal, Krakow, Santa Fe, Auckland, Bristol""",
        """{v} has been my home for ten years. / I relocated to {v} over the summer. / I rent a
        studio in {v}. / I'm living in {v} at the moment.""",
    ),
    (
        " works as {v}",
        """a nurse, a teacher, an architect, a plumber, a pilot, a chef, an accountant, a
        librarian, a dentist, a carpenter, a translator, a firefighter, a baker, an electrician, a
        lawyer, a photographer, a bus driver, a data analyst, a welder, a pharmacist, a tailor, an
        optician, a gardener, a tour guide""",
        """I work as {v}. / I'm {v} at a small place downtown. / I've been {v} for eight years. /
        My job as {v} keeps me busy. / I just started a new job as {v}. / I make my living as {v}.
        / I earn a living as {v}. / I'm working as {v} at the moment. / I got hired as {v} last
        month. / For a living, I'm {v}. / I trained as {v} and I still do it full time. / Working
        as {v} means early mornings for me.""",
        """a surgeon, a florist, an engineer, a journalist, a mechanic, an editor, a paramedic, a
        barber, a sound technician, a postman""",
        """I'm employed as {v}. / I've worked as {v} since 2015. / By profession I'm {v}. / I found
        work as {v} this year.""",
    ),
    (
        " has a {k} named {v}",
        """dog, cat, rabbit, parrot, hamster, corgi, beagle, husky, terrier, labrador, gecko:
        Biscuit, Luna, Pepper, Ziggy, Mochi, Clover, Bandit, Olive, Pickles, Shadow, Nugget,
        Willow, Rusty, Peanut, Domino""",
        """I have a {k} named {v}. / I've got a {k} called {v}. / My {k} {v} woke me up at five
        again. / My {k} is called {v}. / We adopted a {k} and named it {v}. / I just got a {k}! The
        name is {v}. / I share my home with a {k} named {v}. / I need to take my {k} {v} to the
        vet. / {v}, my {k}, is asleep on my keyboard. / My {k}'s name is {v}. / {v} is the name of
        my {k}. / I came home to my {k} {v} chewing on a shoe.""",
        """puppy, kitten, turtle, ferret, canary, poodle: Waffles, Marble, Gizmo, Hazel, Taco,
        Comet, Figaro""",
        """I own a {k} called {v}. / My {k} {v} hid under the sofa all day. / I have a {k} and its
        name is {v}. / I live with a {k} named {v}.""",
    ),
    (
        " is allergic to {v}",
        """peanuts, shellfish, cats, pollen, penicillin, gluten, latex, eggs, soy, dust, bee
        stings, walnuts, wool, mustard, sesame, mold, aspirin, celery, kiwi, hazelnuts""",
        """I'm allergic to {v}. / I have a bad allergy to {v}. / Please remember that I'm allergic
        to {v}. / I found out that I'm allergic to {v}. / I can't be around {v} because of my
        allergy. / My allergy to {v} is acting up again. / The doctor says I'm allergic to {v}. / I
        carry medicine since I'm allergic to {v}. / I break out in hives because of {v}, it's an
        allergy. / {v} and I don't mix, I'm allergic. / Sadly I'm really allergic to {v}.""",
        """strawberries, dogs, almonds, milk, ragweed, shrimp, feathers, cashews, mango, nickel""",
        """I've had an allergy to {v} since I was little. / I turn out to be allergic to {v}. / I
        have to avoid {v} because I'm allergic. / My allergist confirmed it: I'm allergic to
        {v}.""",
    ),
    (
        "'s birthday is {v}",
        """January 3, January 17, February 9, February 21, March 5, March 14, March 30, April 8,
        April 26, May 2, May 19, June 11, June 23, July 6, July 28, August 15, August 31, September
        7, September 20, October 1, October 24, November 10, November 29, December 4, December
        18""",
        """My birthday is {v}. / My birthday is on {v}. / I was born on {v}. / My birthday falls on
        {v} this year, like every year. / I turn thirty on {v}. / I'm having a birthday party on
        {v}, the day itself. / {v} is my birthday. / I celebrate my birthday on {v}. / Mark {v} in
        your calendar, it's my birthday. / I'll be a year older on {v}.""",
        """January 12, February 25, March 22, April 13, May 27, June 16, August 9, October 30""",
        """My birthday comes up on {v}. / It's my birthday on {v}. / I turn forty on {v}. / {v} is
        the day I was born.""",
    ),
    (
        "'s favorite {k} is {v}",
        """color: teal, yellow, purple, red; food: ramen, lasagna, falafel, pancakes, pad thai,
        tacos; season: autumn, summer; fruit: pineapple, cherries, plums; sport: tennis, hockey,
        rugby; animal: the owl, the fox; band: Queen, Coldplay; movie: Casablanca, Alien; drink:
        iced tea, ginger ale; flower: the tulip, jasmine""",
        """My favorite {k} is {v}. / My all-time favorite {k} is {v}. / If I had to pick a favorite
        {k}, I'd say {v}. / {v} is my favorite {k}. / I'd say {v} is my favorite {k}. / You asked
        for my favorite {k}: it's {v}. / For me the best {k} is {v}, my favorite by far. / When it
        comes to a favorite {k}, mine is {v}. / No other {k} comes close to {v}, my favorite. / My
        favorite {k} has always been {v}.""",
        """color: green, navy blue; food: sushi, paella; season: winter; fruit: papaya; sport:
        cricket; animal: the otter; band: Radiohead; movie: Jaws; drink: lemonade; dessert:
        tiramisu, apple pie""",
        """My favorite {k} is definitely {v}. / I think {v} has to be my favorite {k}. / I've
        always called {v} my favorite {k}. / As for my favorite {k}, that would be {v}.""",
    ),
    (
        " has a {k} named {v}",
        """sister, younger sister, twin sister, niece, cousin: Priya, Ingrid, Wendy, Joan, Beth,
        Alma, Rina, Odette, Sunita; brother, younger brother, half brother, stepbrother, cousin:
        Tom, Carlos, Malik, Viktor, Kofi, Dean, Ralph, Emil, Jorge""",
        """I have a {k} named {v}. / My {k} {v} called me last night. / My {k} is called {v}. / I
        grew up sharing a room with my {k} {v}. / My {k}'s name is {v}. / I had lunch with my {k}
        {v}. / {v}, my {k}, just got married. / I'm picking up my {k} {v} from the airport. / My
        {k} {v} taught me how to cook. / You'd like my {k} {v}, we laugh a lot. / I have one {k},
        {v}, and we talk every day.""",
        """big sister, little sister, half sister: Laila, Simone, Helga, Mabel, Noor; big brother,
        little brother, twin brother: Greg, Pedro, Ravi, Boris, Jun""",
        """I have a {k} called {v}. / My {k} {v} is visiting me this week. / I've got a {k} whose
        name is {v}. / I went hiking with my {k} {v}.""",
    ),
    (
        " plans to {v}",
        """run a marathon, buy a house, learn to drive, write a novel, visit Japan, start a bakery,
        adopt a child, climb Mount Fuji, go back to school, open a bookshop, sail to Greece, quit
        smoking, build a cabin, move to Spain, repaint the kitchen, get a tattoo, plant an orchard,
        take a pottery class, record an album, cycle across France, study law""",
        """I'm planning to {v}. / I plan to {v} next year. / I'm going to {v} this summer. / My
        plan is to {v}. / I've decided to {v}. / I made up my mind: I'm going to {v}. / I'm hoping
        to {v} soon, it's all planned. / Next year I'm going to {v}. / I've started saving up
        because I plan to {v}. / The plan is to {v} before I turn fifty. / I'll {v} next spring,
        it's decided.""",
        """walk the Camino, sell the car, learn to surf, start a podcast, visit Iceland, renovate
        the attic, train for a triathlon, take a cooking course, open a cafe, move to Canada""",
        """I intend to {v} in the autumn. / My goal this year is to {v}. / Some day soon I plan to
        {v}. / I've made plans to {v}.""",
    ),
    (
        " enjoys {v}",
        """rock climbing, knitting, baking bread, bird watching, salsa dancing, gardening, surfing,
        painting, fishing, doing yoga, beekeeping, hiking, woodworking, stargazing, collecting
        stamps, writing poetry, roller skating, swimming, making candles, solving crosswords,
        sketching""",
        """I really enjoy {v}. / I love {v} on weekends. / My hobby is {v}. / I spend most of my
        free time {v}. / I got into {v} last year and now I love it. / {v} is my favorite way to
        relax. / {v} is how I unwind. / Lately I'm hooked on {v}. / Nothing makes me happier than
        {v}. / I've picked up {v} and I can't stop. / I've always enjoyed {v}. / On Sundays you'll
        find me {v}.""",
        """kayaking, archery, juggling, restoring furniture, line dancing, brewing beer, foraging,
        horse riding, doing puzzles, embroidery""",
        """In my spare time I like {v}. / On weekends I enjoy {v}. / I'm a big fan of {v}. / My
        main hobby is {v}.""",
    ),
    (
        " is learning {v}",
        """Spanish, Mandarin, Arabic, Dutch, Korean, Swahili, Turkish, Polish, Hindi, Greek,
        Hebrew, Danish, Vietnamese, Czech, Latin, Urdu""",
        """I'm learning {v}. / I've been learning {v} for six months. / I started taking {v}
        lessons. / I'm learning {v} with an app. / My {v} is still shaky, but I'm learning. / I'm
        teaching myself {v}. / I signed up for a {v} class and it's going well. / I practice {v}
        every morning, I'm still a beginner. / I began learning {v} this winter. / My {v} teacher
        says I'm learning fast.""",
        """German, Japanese, Russian, Italian, Thai, Welsh, Tamil, Swedish""",
        """I'm trying to learn {v}. / I take {v} lessons on Tuesdays. / I've started learning {v}.
        / These days I'm busy learning {v}.""",
    ),
    (
        " is married to {v}",
        """husband: Daniel, Kenji, Omari, Stefan, Hugh, Marcus, Pierre, Tariq, Dylan; wife: Rosa,
        Ruth, Claire, Leila, Bianca, Yuki, Edith, Gwen, Valeria""",
        """I'm married to {v}. / My {k} {v} is cooking tonight. / My {k} {v} says hello. / I've
        been married to {v} for five years. / My {k}'s name is {v}. / {v} and I got married in
        June. / I married {v} two summers ago. / My {k} is called {v}. / I met my {k} {v} at a bus
        stop. / {v}, my {k}, snores like a bear. / My {k} {v} and I went out for dinner.""",
        """husband: Andre, Bruno, Walter, Fergus, Kwame; wife: Sylvia, Mei, Ines, Amara, Judith""",
        """The name of my {k} is {v}. / I got married to {v} last year. / My {k} {v} loves this
        song. / {v} and I have been married for a decade.""",
    ),
)

_SPEAKERS = (
    """Maya, Liam, Sofia, Noah, Aisha, Ethan, Chloe, Diego, Hana, Oscar, Nadia, Felix, Grace, Ivan,
    Zoe, Samuel, Lucia, Amir, Emma, Jonas, Fatima, Leo, Nina, Hugo, Tara, Mateo, Elena, Caleb,
    Yara, Victor, Alice, Rohan, Clara, Andrei, Jasmine, Paul, Keiko, Martin, Olivia, Dmitri, Anika,
    Robert, Selma, Kevin, Paula, Ahmed, Lena, Jack, Carmen, Theo, Isabel, Nikhil, Julia, Patrick,
    Amelia, Youssef, Sara, Gabriel, Linda, Stanley, Mia, Trevor, Rachel, Arjun, Eva, Conor, Naomi,
    Luis, Hannah, Abdul""",
    """Freya, Marco, Adele, Tobias, Imani, Lucas, Petra, Hassan, Molly, Sergio, Aiko, Quentin,
    Renata, Callum, Deepa, Irene, Bashir, Nora, Elliot, Thandi, Gustav, Paloma, Winston, Xenia""",
)
_GREETINGS = (
    """Hi there! / Good morning! / Hey, how's it going? / Hello again. / Ha, that's funny. / Sorry
    for the late reply. / Thanks for asking! / Oh, good question. / Well, let me tell you. / Guess
    what! / So, a bit about me. / Haha, fair enough. / Okay, I'm back. / Wow, long time no see! /
    Good to hear from you. / Hmm, let me think. / By the way, before I forget. / Right, where were
    we? / Nice to meet you! / Evening, everyone.""",
    """Hey hey! / Good afternoon! / Hi, thanks for the message. / Oh, you'll like this. / Let me
    introduce myself. / Morning! / Yes, exactly. / Alright, here goes.""",
)
_ASIDES = (
    """The weather is lovely today. / It's been raining all morning. / What a week it has been. /
    How was your weekend? / Did you sleep well? / Let's talk again tomorrow. / Hope you're doing
    well. / That sounds great! / Can you believe it's already Thursday? / The coffee machine is
    broken again. / What do you think about that? / Anyway, enough about that. / No worries at all.
    / You always make me laugh. / Could you tell me a joke? / Thank you so much for your help. /
    Totally agree with you. / The traffic was terrible this morning. / What time is it there? / It
    got dark so early today. / Talk to you soon! / Let me know when you're free. / The news was so
    boring tonight. / Hold on, someone is at the door. / How are things on your end? / That made my
    day. / Is it just me, or is it cold in here? / Can you help me write an email? / See you at the
    meeting. / Please remind me to send that file. / Have you seen the moon tonight? / The internet
    is slow today. / Well, time flies. / Sounds like a plan. / What should we cook tonight? / The
    elevator took forever. / There was a long line at the store. / Thank goodness it's Friday. / Do
    you have any tips for falling asleep? / The power went out for an hour. / What did you think of
    the game? / Let's grab lunch sometime. / You won't believe how windy it is. / Congratulations
    on the good news! / The sky was pink this morning. / The bus never showed up. / The neighbors
    were loud last night. / The stars are bright tonight. / Someone parked in front of the gate. /
    The meeting went fine. / It's too warm in this room. / The garden looks nice after the rain. /
    Any news from the office? / I'm so tired today. / I have to run in a minute. / I'll get back to
    you later. / I need another cup of coffee. / I guess we'll see. / I'm running a little late. /
    I missed your call, sorry. / I had a strange dream last night. / I can't find my keys anywhere.
    / I just finished lunch. / Tuesday again, how did that happen? / Where did the summer go? / Can
    you translate this sentence? / Who won the match last night? / Please write a short poem. /
    What's new with you? / How does this printer work? / Could you explain that again? / That is so
    kind of you. / Not a problem, take your time. / Fingers crossed for tomorrow! / What a lovely
    idea. / The lights keep flickering. / There's so much snow outside. / The train is full this
    morning. / Happy holidays to you too. / Give me a second, please. / Which song is this? / Did
    you get the email? / Enjoy the rest of your day! / Is the shop open today? / The line is
    breaking up a bit. / It's getting late. / What a funny picture! / Good luck with the exam.""",
    """The sunset was beautiful this evening. / How did your meeting go? / Can you recommend a good
    book? / It's so hot outside right now. / Hope you have a nice evening. / The train was late
    again. / Tell me more about that. / Never mind, all sorted out. / Monday already, unbelievable.
    / The inbox is a mess today. / Could you summarize this for me? / That's such a good point. / I
    should get going. / The printer jammed twice today. / Catch you later! / I could use a nap. /
    What are you up to? / Thanks a lot for listening. / Did you watch the news? / It's quite foggy
    this morning.""",
)
_QUESTIONS = (
    """Have you ever been to {v}? / Is it true that {v} is expensive? / How far is it to {v} by
    train? / What's the weather like in {v}? / Do you know a good hotel in {v}? / How many people
    live in {v}? / What do people eat in {v}? / Should we visit {v} one day? / Can you tell me
    something about {v}? / Which airport is closest to {v}? / Did it really snow in {v}? / When was
    {v} founded? / What time is it in {v} now? / Is it safe to walk around {v} at night? / There
    was something about {v} on the news. / The game in {v} was canceled.""",
    """Do you know anything about {v}? / What language do they speak in {v}? / Is {v} worth a
    visit? / What is {v} famous for?""",
)
_LINKS = (
    """Also, / Oh, and / And / Plus, / What else... / By the way, / Besides, / Another thing:""",
    """On top of that, / One more thing: / And also,""",
)


def _tables(side: Literal[0, 1]) -> Tables:
    relations = tuple(
        Relation(wording, _values(texts[2 * side]), _items(texts[2 * side + 1], "/"))
        for wording, *texts in _FACTS
    )
    pools = (_items(pool[side], "/") for pool in (_GREETINGS, _ASIDES, _QUESTIONS, _LINKS))
    return Tables(relations, _items(_SPEAKERS[side], ","), *pools)


TABLES: dict[str, Tables] = {"train": _tables(0), "heldout": _tables(1)}
