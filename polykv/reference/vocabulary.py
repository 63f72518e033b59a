"""All words of the generator by category; no word is in two categories.

Each value is one word, hence one token: with two tokens the model would have to bind a value to its owner twice.
Categories of values have at least 19 members, so that answers cannot be guessed without the document.
"""
# ruff: noqa: SIM905

NAMES = tuple(
    """Ada Abel Agnes Alba Aldo Alma Amos Anton Arlo Asta Bea Ben Berta Boris Bruno Bram Cara Carl
    Cora Cleo Clara Cyril Dan Dora Dario Delia Dov Edda Egon Eli Ella Elmo Emil Enid Erik Esme Ezra
    Fay Felix Fern Finn Flora Frank Freya Fritz Gail Gemma Gerd Gina Gita Greta Gus Hal Hana Hank
    Hedy Helga Henk Hilda Hugo Ida Igor Ilse Imre Ines Inga Ira Iris Isak Ivan Ivy Jack Jan Jana
    Jeb Jens Joan Jorg Jules Juno Kai Karin Karl Kate Keith Kim Kira Klaus Knut Kurt Lars Lea Leif
    Lena Leo Lexa Lila Linus Lola Lotte Luca Lucy Ludo Luke Luz Mae Maia Marek Mark Marta Max Mia
    Milo Mina Moira Mona Moses Myra Nadia Nell Nia Nico Nils Nina Noah Nora Odin Olaf Olga Oona
    Orla Oscar Otis Otto Owen Paco Paul Pearl Penny Per Petra Pia Piet Polly Quinn Ralf Ramon Rhea
    Rita Rolf Romy Rosa Roy Rufus Ruth Sam Sara Saul Selma Seth Silas Sina Skye Sofia Stan Sven
    Tara Tess Theo Thor Tilda Timo Tina Tom Tove Troy Uma Una Uri Ursa Vera Vic Viola Vito Wade
    Walt Wanda Wes Willa Wim Xena Yael Yan Yara Yves Zane Zara Zeno Zita Zoe Zora""".split()
)
SURNAMES = tuple(
    """Archer Barlow Carver Dalton Ellis Fenton Grant Harper Irving Jarvis Keller Lowell Mercer
    Norris Osborn Porter Quigley Ramsey Sutton Thorne Underhill Vance Walsh Yates""".split()
)
PLACES = tuple(
    """Aachen Athens Bergen Berlin Bern Bilbao Bologna Boston Bremen Brno Cairo Calais Cardiff
    Cork Cuzco Dakar Delft Denver Dover Dublin Essen Exeter Fargo Fez Galway Geneva Genoa Ghent
    Graz Haifa Havana Ithaca Jaipur Kiel Kyoto Lagos Leeds Lima Lisbon Lund Lyon Malmo Milan Minsk
    Munich Nantes Naples Nice Oslo Oxford Perth Porto Prague Quito Riga Rome Seoul Tokyo Turin
    Vienna Warsaw York Zagreb Zurich""".split()
)
ITEMS = tuple(
    """apples pears plums cherries lemons melons onions carrots turnips eggs loaves buns pies
    candles ribbons buttons needles baskets barrels bottles bowls spoons forks plates cups pens
    books stamps marbles kites balls bells coins shells stones bricks planks nails ropes sacks
    tiles lamps brushes blankets""".split()
)
ANIMALS = tuple(
    """cat dog goat hen duck goose pony donkey rabbit hamster parrot canary turtle lizard ferret
    hedgehog otter fox badger mouse pigeon owl falcon raven swan lamb calf pig snake frog""".split()
)
DRINKS = tuple(
    """tea coffee cocoa milk water cider juice lemonade punch mead kefir syrup broth soda tonic
    whey mate chai cordial nectar perry shrub sorrel malt""".split()
)
INSTRUMENTS = tuple(
    """flute drum violin cello harp lute banjo guitar piano organ trumpet tuba horn oboe clarinet
    bassoon fiddle zither lyre mandolin accordion whistle gong cymbal viola""".split()
)
COLOURS = tuple(
    """red blue green yellow black white brown grey purple pink crimson scarlet amber teal indigo
    maroon ivory beige turquoise magenta khaki ochre azure lilac""".split()
)
DISHES = tuple(
    """soup stew salad pasta curry omelette pancakes porridge dumplings goulash paella lasagne
    chowder risotto casserole pudding waffles noodles gnocchi pilaf quiche meatballs ratatouille
    couscous""".split()
)
TRADES = tuple(
    """weaver baker miller smith tailor potter carpenter mason painter farmer fisher hunter cook
    teacher doctor nurse judge lawyer pilot sailor driver valet gardener shepherd barber brewer
    butcher cobbler cooper glazier jeweller joiner librarian mayor plumber printer saddler
    sculptor tanner thatcher""".split()
)
EVENTS = tuple(
    """fair market race concert wedding parade picnic regatta harvest auction banquet carnival
    contest debate exhibition feast gala lecture meeting opera pageant rally recital reunion sale
    seminar show sprint tournament trial vigil workshop""".split()
)
MONTHS = tuple(
    """January February March April May June July August September October November
    December""".split()
)
TRAITS = {
    "home": PLACES,
    "pet": ANIMALS,
    "drink": DRINKS,
    "instrument": INSTRUMENTS,
    "colour": COLOURS,
    "dish": DISHES,
}
NUMBERS = tuple(str(n) for n in range(100))
COUNTS = range(2, 31)
PRICES = range(2, 21)
DAYS = range(1, 29)

SPECIALS = ("<unk>", "<pad>", "<eot>")
UNKNOWN, PAD, END_OF_TURN = SPECIALS
