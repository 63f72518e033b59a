"""Names of which tasks make their facts, each one common English word, and kinds of numbers. Torch-free."""

PEOPLE = tuple(
    """Alice Brian Clara David Emma Frank Grace Henry Irene James Karen Louis Maria Nathan Olivia Peter Rachel Simon
    Teresa Victor Wendy Adam Beth Carl Diana Eric Fiona George Helen Ivan Julia Kevin Laura Martin Nora Oscar Paula
    Robert Sarah Thomas""".split()  # noqa: SIM905
)
CITIES = tuple(
    """Paris London Berlin Madrid Rome Vienna Prague Oslo Dublin Lisbon Athens Moscow Cairo Tokyo Delhi Seoul Boston
    Chicago Denver Seattle Toronto Sydney Zurich Geneva Milan Naples Munich Hamburg Warsaw Budapest Stockholm Helsinki
    Brussels Amsterdam Barcelona Istanbul Bangkok Singapore Dallas Houston""".split()  # noqa: SIM905
)
PETS = tuple(
    """dog cat horse rabbit parrot turtle snake hamster mouse goat sheep pig duck chicken goose fox frog lizard pony
    spider monkey donkey fish bear wolf""".split()  # noqa: SIM905
)
NUMBERED = (
    "locker number", "room number", "phone extension", "badge number", "flight number", "ticket number",
    "parking space", "postal code", "radio channel", "case number", "order number", "table number", "bus number",
    "house number", "seat number", "safe code", "gate code", "account number", "invoice number", "student number",
    "passport number", "member number", "license number", "contract number", "customer number",
)  # fmt: skip
