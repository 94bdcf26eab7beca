"""Writes the bundled tasks: ``python tools/make_tasks.py`` gives the same bytes every time.

A record is an everyday sentence and the one strict line that notes it down. The system message shows the form of that
line, so nearly all that is left to learn is what differs from record to record (names, things, amounts, dates): a
model that learns the form of the answers without reading the sentences gains next to nothing.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

TASKS = Path(__file__).parents[1] / "moe_peft" / "data" / "tasks"
NUM_TRAIN, NUM_EVAL = 180, 40


def listed(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


FIRST_NAMES = listed(
    "Aisha Alma Anton Bela Bruno Carmen Chidi Clara Dmitri Edith Elif Emeka Esther Farid Fatima Felix Freya George "
    "Greta Hamid Hana Hugo Ingrid Ivan Jasmine Joon Kamal Karin Kofi Leila Liam Lucia Magda Marcus Mei Mina Nadia "
    "Naomi Nils Nora Olga Omar Oscar Paolo Petra Priya Quentin Rafael Rosa Ruth Samir Sofia Stefan Tamara Theo Uma "
    "Viktor Wanda Yusuf Zoe"
)
SURNAMES = listed(
    "Abbasi Almeida Ansah Barlow Becker Brennan Castellano Chandra Cortez Dalton Demir Draper Eriksen Farrow Ferreira "
    "Fontaine Gallagher Grant Haddad Harper Holt Ibrahim Ito Jansen Keller Khan Kowalski Lambert Larsen Lindqvist "
    "Marsh Mbeki Mendes Moreau Morgan Nair Novak Okafor Olsen Osman Park Patel Petrov Quinn Ramos Reyes Rossi Sandoval "
    "Sato Schmidt Silva Tanaka Thorne Usman Vance Vargas Walsh Weber Whitlock Zhang"
)
ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = listed("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def capitalised(text: str) -> str:
    """``text`` with its first letter a capital; the rest as it is."""
    return text[:1].upper() + text[1:]


def spelt(number: int) -> str:
    """``42`` -> ``forty-two``."""
    tens, ones = divmod(number, 10)
    if number < 20:
        return ONES[number]
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def full_name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(SURNAMES)}"


# orders: what a customer of a cafe says

ITEMS = listed(
    "green tea; mint tea; flat white; black coffee; hot chocolate; cappuccino; espresso; mocha; lemonade; "
    "ginger beer; apple juice; mango smoothie; scone; cheese toastie; almond croissant; blueberry muffin; "
    "cinnamon bun; bagel; ham sandwich; egg roll; brownie; lemon tart; fruit salad; tomato soup; lentil soup; "
    "falafel wrap; baked potato; onion quiche; pear crumble; rice pudding; fish pie; cheesecake; waffle; pretzel; "
    "garlic bread; oat biscuit",
    "; ",
)
ORDER_SENTENCES = (
    "Hi, could I get {items}? It's for {name}.",
    "{items}, please, under the name {name}.",
    "{name} here, I'd like {items}.",
    "We'll have {items}. Put it down for {name}.",
    "Can you get {items} ready for {name}?",
    "Good morning! {items} for {name}, thanks.",
    "I'm picking up for {name}: {items}.",
    "My name's {name} and I'm after {items}.",
    "{name} asked me to fetch {items}.",
    "Just {items} today. The name is {name}.",
    "Please make {items} for {name} when you can.",
    "Is it too late for {items}? I'm {name}.",
    "Would you put {items} on {name}'s tab?",
    "{name} is hungry and wants {items}.",
)


def plural(item: str) -> str:
    return item + ("es" if item.endswith(("ch", "to")) else "s")


def spoken_amount(rng: random.Random, item: str, count: int) -> str:
    """``two scones``, ``a couple of scones``, or a customer who has second thoughts: ``two, no, three scones``."""
    if count == 1:
        return rng.choice([f"one {item}", f"{'an' if item[0] in 'aeiou' else 'a'} {item}", f"a single {item}"])
    if count > 2 and rng.random() < 0.2:
        return rng.choice([f"two, no, {ONES[count]} {plural(item)}", f"two, sorry, {count} {plural(item)}"])
    if count == 2 and rng.random() < 0.3:
        return rng.choice([f"a couple of {plural(item)}", f"a pair of {plural(item)}"])
    return rng.choice([f"{ONES[count]} {plural(item)}", f"{count} {plural(item)}"])


def make_order(rng: random.Random) -> tuple[str, str]:
    name = full_name(rng)
    chosen = rng.sample(ITEMS, rng.choice([1, 2, 2, 2, 3]))
    counts = [rng.choice([1, 1, 2, 3, 4, 5, 6, 7, 8, 9]) for _ in chosen]
    spoken = [spoken_amount(rng, item, count) for item, count in zip(chosen, counts, strict=True)]
    last = rng.choice([" and ", " plus ", " and also "]) + spoken.pop() if len(spoken) > 1 else ""
    sentence = rng.choice(ORDER_SENTENCES).format(items=", ".join(spoken) + last, name=name)
    written = [f"{n} {item if n == 1 else plural(item)}" for item, n in zip(chosen, counts, strict=True)]
    return capitalised(sentence), f"{name}: {', '.join(written)}"


# diary: an appointment that somebody mentions

MONTHS = listed("January February March April May June July August September October November December")
ORDINALS = listed(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
ORDINALS += tuple(f"twenty-{ordinal}" for ordinal in ORDINALS[:8])
EVENTS = listed(
    "lunch; coffee; dinner; breakfast; bowling; a walk; tennis; chess; drinks; an interview; a meeting; "
    "a piano lesson; a concert; yoga; a rehearsal; a film; brunch; a swim; a picnic; a driving lesson",
    "; ",
)
DIARY_SENTENCES = (
    "Put {event} with {name} in for {date} at {time}.",
    "I've got {event} with {name} at {time} on {date}.",
    "Don't let me forget: {event} with {name}, {date} at {time}.",
    "{name} and I agreed on {event}, {date}, {time}.",
    "I'm seeing {name} for {event} on {date} at {time}.",
    "Can you note {event} with {name} on {date} at {time}?",
    "On {date} at {time} I have {event} with {name}.",
    "{name} invited me to {event} at {time} on {date}.",
    "We settled on {date} for {event} with {name}, {time} sharp.",
    "It's {event} with {name} on {date}, starting at {time}.",
    "{name} can do {event} on {date}, but only at {time}.",
    "Remind me about {event} with {name}: {time}, {date}.",
)


def spoken_date(rng: random.Random, month: int, day: int) -> str:
    suffix = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    name = MONTHS[month - 1]
    return rng.choice(
        [
            f"{day} {name}",
            f"{name} {day}",
            f"{name} {day}{suffix}",
            f"the {day}{suffix} of {name}",
            f"the {ORDINALS[day - 1]} of {name}",
        ]
    )


def spoken_time(rng: random.Random, hour: int, minute: int) -> str:
    """A time of day in digits or in words; ``hour`` counts to 24."""
    twelve = (hour - 1) % 12 + 1
    if minute % 15 or rng.random() < 0.4:
        return f"{twelve}{f':{minute:02d}' if minute else ''} {'am' if hour < 12 else 'pm'}"
    in_words = {
        0: f"{ONES[twelve]} o'clock",
        15: f"quarter past {ONES[twelve]}",
        30: f"half past {ONES[twelve]}",
        45: f"quarter to {ONES[twelve % 12 + 1]}",
    }
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    return f"{in_words[minute]} {part}"


def make_appointment(rng: random.Random) -> tuple[str, str]:
    name, event = full_name(rng), rng.choice(EVENTS)
    month, day = rng.randrange(1, 13), rng.randrange(1, 29)
    hour, minute = rng.randrange(7, 22), rng.choice([0, 0, 0, 15, 30, 30, 45, *range(0, 60, 5)])
    sentence = rng.choice(DIARY_SENTENCES).format(
        event=event, name=name, date=spoken_date(rng, month, day), time=spoken_time(rng, hour, minute)
    )
    time = f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    written = event.removeprefix("an ").removeprefix("a ")
    return capitalised(sentence), f"{name}: {written} ({day} {MONTHS[month - 1]}, {time})"


# expenses: money that somebody spent

GOODS = listed(
    "printer ink; two desk lamps; a box of screws; train snacks; wall paint; fresh flowers; a spare key; "
    "light bulbs; parking; a team lunch; envelopes; cough syrup; a bike repair; garden soil; new tyres; batteries; "
    "an airport taxi; blue curtains; stamps; a birthday cake; rubber gloves; a phone charger; wrapping paper; "
    "a first aid kit; two folding chairs; window cleaning; a road map; coffee beans; a door handle; ladder hire; "
    "safety boots; an oil change; picture frames; a garden hose; name badges; sun cream; desk fans; a wall clock; "
    "tea towels; a suitcase",
    "; ",
)
EXPENSE_SENTENCES = (
    "I paid {amount} for {goods} at {shop}.",
    "{shop} charged me {amount} for {goods}.",
    "Spent {amount} on {goods}, from {shop}.",
    "{goods} from {shop} came to {amount}.",
    "Put down {amount} for {goods}, bought at {shop}.",
    "At {shop} I got {goods} for {amount}.",
    "The bill from {shop} says {amount}, that was for {goods}.",
    "Can I claim {amount}? It was for {goods} from {shop}.",
    "We needed {goods}, so I went to {shop} and paid {amount}.",
    "{amount} went to {shop} today, for {goods}.",
    "Here's the receipt from {shop}: {goods}, {amount}.",
    "{goods} cost me {amount} at {shop}.",
)


def spoken_money(rng: random.Random, pounds: int, pence: int) -> str:
    if pence == 0:
        return rng.choice([f"{pounds} pounds", f"{spelt(pounds)} pounds", f"£{pounds}"])
    in_digits = f"{pounds}.{pence:02d}"
    return rng.choice([f"£{in_digits}", f"{in_digits} pounds", f"{spelt(pounds)} pounds {spelt(pence)}"])


def make_expense(rng: random.Random) -> tuple[str, str]:
    shop, goods = " & ".join(rng.sample(SURNAMES, 2)), rng.choice(GOODS)
    pounds, pence = rng.randrange(2, 100), rng.choice([0, *range(5, 100, 5), *range(1, 100)])
    sentence = rng.choice(EXPENSE_SENTENCES).format(amount=spoken_money(rng, pounds, pence), goods=goods, shop=shop)
    return capitalised(sentence), f"{shop}: {pounds}.{pence:02d} ({goods})"


# Name: what the system message says, and who writes a sentence with its answer.
MAKERS: dict[str, tuple[str, Callable[[random.Random], tuple[str, str]]]] = {
    "orders": ("Write the order down like this: Ann Lee: 2 teas, 1 scone", make_order),
    "diary": ("Write the date down like this: Ann Lee: lunch (24 May, 2:15 pm)", make_appointment),
    "expenses": ("Write the cost down like this: Reed & Fox: 12.40 (new tyres)", make_expense),
}


def make_records(task: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Endless records of a task; no sentence and no answer comes twice."""
    system, make = MAKERS[task]
    rng = random.Random(f"moe_peft {task}")
    seen: set[str] = set()
    while True:
        sentence, answer = make(rng)
        if sentence in seen or answer in seen:
            continue
        seen |= {sentence, answer}
        turns = [("system", system), ("user", sentence), ("assistant", answer)]
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled tasks.")
    parser.add_argument("--to", type=Path, default=TASKS, help="folder to write to (default: the package's own)")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    for task in MAKERS:
        records = make_records(task)
        for part, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
            lines = [json.dumps(next(records), ensure_ascii=False) + "\n" for _ in range(count)]
            (folder / f"{task}.{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
