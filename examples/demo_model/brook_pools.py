"""Word pools and random values that Brook's synthetic corpus is built from.

Everything here was written for this project. Whatever the model has to *copy* and that is made of parts (an
invented word, a code, a phrase, a fact, a request) belongs to one of two splits: about one in eight is held out, and
training never sees it. The split is a checksum of the text, so it is the same in every process and needs no stored
list. Single dictionary words are in both splits: each is one token, and a token that training never writes cannot
be written later.

This module knows nothing about tasks, chat messages or tokens.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Final

TRAIN: Final = "train"
HELD_OUT: Final = "held-out"
# A share of 1/8 leaves enough held-out values for a thousand cases and costs training little variety.
_HELD_OUT_MODULUS: Final = 8


def split_of(value: str) -> str:
    """Say which split a value belongs to."""
    return HELD_OUT if zlib.crc32(value.lower().encode()) % _HELD_OUT_MODULUS == 0 else TRAIN


def words(text: str) -> tuple[str, ...]:
    """The words of a text; an underscore stands for a space within one."""
    return tuple(word.replace("_", " ") for word in text.split())


FIRST_NAMES: Final = words("""
Ada Adil Aisha Alba Alden Amara Amir Ana Anders Anika Anton Arlo Astrid Aurel Ayla Basil Beatriz Bela Bodil Bram
Bruno Callum Camila Carmen Cato Cecil Chidi Clara Cleo Cyrus Dalia Dario Davor Delia Dimitri Dora Edith Edwin Eero
Eira Elio Elsa Emeka Emil Enzo Erik Esme Etta Ezra Farah Felix Fenna Fiona Flora Franka Freya Gemma Gideon Goran
Greta Gus Hana Hanne Harun Hazel Hector Heidi Hugo Ida Idris Ilse Imani Ines Ingrid Iris Isak Ivan Ivo Jabari Jana
Jarek Jelena Joana Jonas Judit Jules Kaia Kai Karim Katya Keiko Kenji Kira Klaus Kofi Lana Lars Laszlo Leila Lena
Leo Levi Linnea Lorenz Lucia Ludo Luka Lupe Maeve Magda Maja Malik Manon Marek Marit Marta Mateo Maya Milan Milo
Mina Mira Moira Nadia Naomi Nils Nina Noor Nora Olaf Olga Omar Oona Orla Oscar Otto Paloma Pavel Petra Pia Priya
Quentin Rafael Rania Remy Rhea Rida Rosa Rufus Runa Sabine Salma Samir Sanna Selma Signe Silas Simone Sina Sofia
Soren Stella Sven Tamar Tariq Teo Thea Tilda Tobias Tove Ugo Ulla Uma Vera Viktor Viola Wanda Willa Xenia Yara Yusuf
Zara Zeno Zoe Alice Bob Carol David Emma Frank Grace Henry Jack Kate Liam Mary Oliver Paul Rita Sara Tom Victor John
Anna Peter Maria James Linda George Laura Mark Julia Sam Ben Ruth Lucy Max""")

SURNAMES: Final = words("""
Abara Adler Aldana Almgren Amsel Arden Bakker Balog Barros Becker Bellamy Berg Birch Blom Bonnet Brandt Calder
Carver Castell Cho Conrad Costa Dahl Darrow Demir Doran Drexler Duarte Eklund Engel Farrow Fischer Fonseca Forsyth
Frost Galvan Garner Haas Hale Halloran Hartmann Holm Horvat Ibarra Ito Jansen Juhl Kaplan Keller Kimura Kovac Krog
Lange Larsen Lindqvist Lowell Lund Maddox Marsh Mercer Moreau Morrow Nakata Novak Okafor Olsen Ortega Paredes Penn
Pires Quist Rademaker Ramos Reyes Rossi Rowan Sandoval Sato Schiller Serrano Silva Stark Stone Sund Tanaka Thorne
Torres Ueda Vance Varga Vega Voss Walsh Weber Wilder Winter Yilmaz Zeller Smith Brown Jones Miller Davis Young""")

CITIES: Final = words("""
Accra Algiers Amman Amsterdam Ankara Antwerp Athens Auckland Baku Bangkok Barcelona Basel Beirut Belgrade Bergen Berlin
Bilbao Bogota Bordeaux Boston Bratislava Bremen Brussels Bucharest Budapest Cairo Calgary Cardiff Chicago Cologne
Copenhagen Cork Dakar Dallas Delhi Denver Dhaka Dresden Dublin Edinburgh Florence Geneva Genoa Ghent Glasgow Graz Haifa
Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kampala Kigali Krakow Kyoto Lagos Leeds Lille Lima Lisbon Liverpool
Ljubljana London Lyon Madrid Malaga Manila Marseille Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Nantes
Naples Oslo Ottawa Oxford Palermo Paris Perth Porto Prague Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago
Sarajevo Seattle Seoul Seville Shanghai Singapore Sofia Stockholm Sydney Tallinn Tbilisi Tokyo Toronto Trieste Tunis
Turin Valencia Vancouver Vienna Vilnius Warsaw Zagreb Zurich New_York San_Francisco Los_Angeles Cape_Town Hong_Kong
Buenos_Aires Mexico_City Tel_Aviv""")

FRUITS: Final = words("""
apple apricot banana blackberry blueberry cherry clementine coconut cranberry currant date fig gooseberry grape
grapefruit guava kiwi kumquat lemon lime lychee mandarin mango melon mulberry nectarine orange papaya peach pear
persimmon pineapple plum pomegranate quince raspberry rhubarb strawberry tangerine watermelon""")
ANIMALS: Final = words("""
badger bat bear beaver bee bison buffalo camel cat cheetah cow crab crane crow deer dog dolphin donkey duck eagle
elephant falcon ferret fox frog gazelle giraffe goat goose hare hawk hedgehog heron horse jackal jaguar kangaroo koala
lemur leopard lion lizard llama lynx marten mole moose mouse newt octopus otter owl panda panther parrot penguin pig
pony puffin rabbit raccoon rat raven robin salmon seal shark sheep snail sparrow spider squirrel stork swan tiger toad
turtle walrus weasel whale wolf zebra""")
COLOURS: Final = words("""
amber beige black blue bronze brown copper coral cream crimson cyan gold gray green indigo ivory khaki lavender lilac
magenta maroon mint navy olive orange pink plum purple red rose rust sand scarlet silver tan teal turquoise violet white
yellow""")
OBJECTS: Final = words("""
anchor barrel basket bell bench boat book bottle bowl box bridge broom bucket cabin cabinet candle carpet cart chair
chest clock coat compass crate cup cupboard desk door drawer drum fence flag flute fountain garage gate glove hammer hat
helmet kettle key ladder lamp lantern locker map mirror notebook oven paddle parcel pen piano pillow plate pump radio
ring robot rope safe scarf shed shelf shield shovel sled spoon stove suitcase table tent ticket tower train tray truck
trunk umbrella vase vault violin wagon wallet watch wheel window""")
ADJECTIVES: Final = words("""
big bitter bold brave bright broken calm careful clean clever cold cool curious dark deep dry dusty early empty fast
flat fresh gentle glad golden grand great happy heavy hidden high hollow honest hot huge kind large late lazy light
little lonely long loud lucky narrow neat new noisy old open pale patient plain polite proud quick quiet rare round
rough sharp shiny short shy silent slow small smooth soft steady steep strange strong sweet tall thin tidy tiny warm
wide wild wise wooden young""")
PROFESSIONS: Final = words("""
actor architect astronomer baker barber beekeeper biologist blacksmith botanist builder butcher captain carpenter chef
chemist clerk cook dancer dentist designer doctor driver editor electrician engineer farmer firefighter fisher florist
gardener geologist glazier guide jeweller journalist judge lawyer librarian locksmith mason mechanic miller miner
musician nurse painter pharmacist photographer pilot plumber poet potter sailor scientist sculptor singer surgeon tailor
teacher translator weaver welder writer""")
PLACES: Final = words("""
airport attic bakery barn basement bay beach camp castle cave cellar chapel cliff courtyard farm field forest garden
gallery greenhouse hall harbour hill hospital hotel house island kitchen lake library lighthouse market meadow mill
mountain museum office orchard palace park port pond quarry river school shop shore square stable station street theatre
tunnel valley village vineyard workshop yard""")
FOODS: Final = words("""
bread broth butter cake cheese chowder cookies curry dumplings eggs honey jam lentils muffins mushrooms noodles nuts
oats olives omelette pancakes pasta pie pizza porridge potatoes pretzels pudding ravioli rice risotto salad sandwich
soup spinach stew sushi tacos toast waffles yoghurt""")
INSTRUMENTS: Final = words("""
accordion banjo bassoon bugle cello clarinet cornet fiddle flute guitar harmonica harp horn lute lyre mandolin oboe
organ piano piccolo saxophone sitar tambourine trombone trumpet tuba ukulele viola violin xylophone""")
RIVERS: Final = words("""
Amazon Congo Danube Dnieper Douro Ebro Elbe Euphrates Ganges Garonne Indus Loire Mekong Mississippi Murray Niger Nile
Oder Po Rhine Rhone Seine Severn Tagus Thames Tiber Tigris Vistula Volga Yangtze Yukon Zambezi""")
COUNTRIES: Final = words("""
Argentina Australia Austria Belgium Bolivia Brazil Bulgaria Canada Chile China Colombia Croatia Cuba Denmark Egypt
Estonia Finland France Germany Ghana Greece Hungary Iceland India Indonesia Ireland Israel Italy Japan Kenya Latvia
Lithuania Mexico Morocco Nepal Norway Peru Poland Portugal Romania Senegal Serbia Slovakia Slovenia Spain Sweden
Switzerland Thailand Tunisia Turkey Ukraine Uruguay Vietnam""")
TREES: Final = words(
    "alder ash aspen beech birch cedar chestnut cypress elm fir hazel hornbeam juniper larch lime maple "
    "oak olive pine poplar rowan spruce sycamore walnut willow yew"
)
FLOWERS: Final = words(
    "aster begonia bluebell buttercup carnation crocus daffodil dahlia daisy foxglove gentian geranium "
    "iris jasmine lavender lily lotus marigold orchid pansy peony poppy primrose rose sunflower "
    "tulip violet"
)
METALS: Final = words("aluminium bronze chromium cobalt copper gold iron lead nickel platinum silver steel tin titanium tungsten zinc")
VEGETABLES: Final = words(
    "artichoke asparagus beetroot broccoli cabbage carrot cauliflower celery cucumber fennel garlic "
    "kale leek lettuce onion parsnip pea pepper potato pumpkin radish spinach turnip"
)
COMMON: Final = words("""
a able about above across after again against all almost alone along already also always among an and another any are
around as ask at away back be because become been before began behind being below best better between black body both
boy brown but buy by call came can care change child city close come could country cut day did different do does dog
done door down draw drive each early earth eat end enough even ever every example eye face fact fall family far father
feel feet few field find first fish five food for form found four fox from full game gave get girl give go good got
great group grow had half hand hard has have he head hear help her here high him his hold home hope hour house how hundred
i idea if important in into is it jump jumps just keep kind king knew know land large last later laugh lazy learn leave
left less let letter life light like line list little live long look love made make man many may me mean men might mile
mind money moon more morning most mother move much music must my name near need never new next night no north not note
nothing now number of off often oh old on once one only open or other our out over own paper part past people perhaps
picture place plan plant play point power problem quick quite rain read ready real red remember rest right river road
rock room round run said same saw say school sea second see seem sentence set she short should show side sing sit six
sleep small snow so some song soon sound south stand star start state step still stop story street strong study such
sun sure table take talk tell ten than that the their them then there these they thing think this those though thought
thousand three through time to today together told tomorrow tonight too took top town travel tree true try turn two
under until up us use very visit voice wait walk want war warm was watch water way we week well went were west what
when where which while white who whole why will wind wish with without woman word work world would write year yes
yesterday yet you young your hello world please thanks""")
PLANETS: Final = words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")
DAYS: Final = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS: Final = words("January February March April May June July August September October November December")
LANGUAGES: Final = words(
    "Arabic Chinese Czech Danish Dutch English Finnish French German Greek Hebrew Hindi Hungarian "
    "Italian Japanese Korean Norwegian Polish Portuguese Romanian Spanish Swedish Turkish"
)
CURRENCIES: Final = words("USD EUR GBP JPY CHF SEK NOK DKK PLN CZK HUF CAD AUD NZD INR CNY BRL ZAR TRY KRW")
SPORTS: Final = words(
    "archery badminton basketball boxing climbing cricket curling cycling fencing football golf "
    "gymnastics handball hockey judo rowing rugby running sailing skating skiing surfing swimming "
    "tennis volleyball wrestling"
)
PLURALS: Final = words(
    "apples beads bolts books bottles boxes buttons candles cards chairs coins cups eggs flowers jars "
    "keys lamps lemons marbles nails oranges pages pears pencils plates plums postcards ribbons rocks "
    "seeds shells spoons stamps stickers stones tickets tiles tomatoes toys"
)
VERBS: Final = words(
    "add archive assign book build cancel check clean close compare copy count create delete describe "
    "draw fetch find fix get list load lock log measure merge move open order pack paint pause plan "
    "play print publish read record remove rename repair report reserve reset restart save scan "
    "schedule search sell send set share show start stop store submit sync tag test track update "
    "upload verify weigh write"
)
NOUNS: Final = words(
    "account album alarm alert answer appointment archive article asset backup badge batch bill "
    "booking branch budget calendar camera card claim client contact contract course delivery device "
    "document engine event file flight folder form game grade graph group guest invoice item job label "
    "lesson letter light list loan map meeting member memo menu message meter module note offer order "
    "package page parcel payment permit person photo playlist policy poll price product profile project "
    "prompt queue receipt recipe record refund region report request review room route rule sample score "
    "sensor server session shelf shipment shop signal song stock student survey table task team template "
    "ticket timer token tool topic track train trip user vehicle video visit voucher warehouse widget"
)

CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "fruits": FRUITS,
    "animals": ANIMALS,
    "colours": COLOURS,
    "colors": COLOURS,
    "professions": PROFESSIONS,
    "jobs": PROFESSIONS,
    "foods": FOODS,
    "instruments": INSTRUMENTS,
    "musical instruments": INSTRUMENTS,
    "rivers": RIVERS,
    "countries": COUNTRIES,
    "cities": CITIES,
    "trees": TREES,
    "flowers": FLOWERS,
    "metals": METALS,
    "vegetables": VEGETABLES,
    "planets": PLANETS,
    "days of the week": DAYS,
    "months": MONTHS,
    "languages": LANGUAGES,
    "sports": SPORTS,
    "first names": FIRST_NAMES,
    "names": FIRST_NAMES,
    "birds": words("crane crow duck eagle falcon goose hawk heron owl parrot penguin puffin raven robin sparrow stork swan"),
}

_ONSETS: Final = words("b br c ch cl d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl st t th tr v w z")
_VOWELS: Final = words("a a a e e e i i o o u ai ea ee ia io oa ou y")
_CODAS: Final = words("b d g k l l m m n n n p r r r s s t t x ck ld lm nd ng nk nt rd rk rn sh st th")


class Pools:
    """Draws random values of one split from a seeded generator."""

    def __init__(self, rng: random.Random, split: str = TRAIN) -> None:
        self.rng = rng
        self.split = split

    def _ours(self, draw: Callable[[], str]) -> str:
        """Draw until a value belongs to this split."""
        while True:
            value = draw()
            if split_of(value) == self.split:
                return value

    def pick(self, pool: tuple[str, ...]) -> str:
        """A dictionary word."""
        return self.rng.choice(pool)

    def word(self) -> str:
        """An invented lower-case word: the copying must work for words that no pool holds."""
        return self._ours(self._any_word)

    def _any_word(self) -> str:
        rng = self.rng
        while True:
            if rng.random() < 0.12:
                return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
            parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
            value = "".join(parts) + (rng.choice(_CODAS) if rng.random() < 0.7 else "")
            if len(value) > 2:
                return value

    def name(self) -> str:
        """A first name, sometimes invented."""
        return self.pick(FIRST_NAMES) if self.rng.random() < 0.6 else self.word().capitalize()

    def surname(self) -> str:
        """A family name, sometimes invented."""
        return self.pick(SURNAMES) if self.rng.random() < 0.5 else self.word().capitalize()

    def full_name(self) -> str:
        """A first and a family name."""
        return self._ours(lambda: f"{self.name()} {self.surname()}")

    def city(self) -> str:
        """A city, sometimes invented."""
        return self.pick(CITIES) if self.rng.random() < 0.7 else self.word().capitalize()

    def digits(self, low: int, high: int) -> str:
        """A string of digits that does not start with zero."""
        rng = self.rng
        while True:
            size = rng.randint(low, high)
            value = str(rng.randint(10 ** (size - 1), 10**size - 1))
            if size < 3 or split_of(value) == self.split:
                return value

    def code(self) -> str:
        """A code such as ``KX-482``, ``b7f2`` or ``90417``."""
        rng = self.rng
        while True:
            kind = rng.random()
            letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
            if kind < 0.3:
                value = self.digits(3, 6)
            elif kind < 0.5:
                value = f"{letters}-{rng.randint(10, 9999)}"
            elif kind < 0.7:
                value = f"{letters}{rng.randint(1, 999)}"
            elif kind < 0.85:
                value = "".join(rng.choice("abcdefghkmnpqrstuvwxyz23456789") for _ in range(rng.randint(4, 7)))
            else:
                value = f"{self.word()}-{rng.randint(1, 99)}"
            if split_of(value) == self.split:
                return value

    def date(self) -> str:
        """An ISO date."""
        rng = self.rng
        return f"{rng.randint(1990, 2049)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"

    def clock(self) -> str:
        """A time of day."""
        return f"{self.rng.randint(0, 23):02d}:{self.rng.randrange(0, 60, 5):02d}"

    def email(self) -> str:
        """An e-mail address under the domains reserved for examples."""
        tail = self.rng.choice(("example.com", "example.org", "example.net"))
        return f"{self.name().lower()}.{self.surname().lower()}@{tail}"

    def noun_phrase(self) -> str:
        """Such as ``red door`` or ``velmo kettle``."""
        return self._ours(self._any_noun_phrase)

    def _any_noun_phrase(self) -> str:
        rng = self.rng
        head = self.pick(OBJECTS) if rng.random() < 0.85 else self.word()
        kind = rng.random()
        if kind < 0.4:
            return f"{self.pick(COLOURS)} {head}"
        if kind < 0.75:
            return f"{self.pick(ADJECTIVES)} {head}"
        return f"{self.word()} {head}" if kind < 0.85 else head

    def title(self) -> str:
        """A title of two to four words."""
        return self._ours(self._any_title)

    def _any_title(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.4:
            return f"The {self.pick(ADJECTIVES).capitalize()} {self.pick(OBJECTS).capitalize()}"
        if kind < 0.7:
            return f"{self.pick(NOUNS).capitalize()} of {self.word().capitalize()}"
        return f"{self.word().capitalize()} and the {self.pick(ANIMALS).capitalize()}"

    def phrase(self) -> str:
        """Some plain words, for notes, queries and messages."""
        return self._ours(self._any_phrase)

    def _any_phrase(self) -> str:
        rng = self.rng
        kind = rng.randrange(9)
        if kind > 6:
            return " ".join(rng.choice(COMMON) for _ in range(rng.randint(2, 8)))
        if kind == 0:
            return f"the {self.pick(NOUNS)} for {self.name()} is ready"
        if kind == 1:
            return f"please bring the {self.noun_phrase()}"
        if kind == 2:
            return f"meet me at the {self.pick(PLACES)}"
        if kind == 3:
            return f"{self.pick(ADJECTIVES)} {self.pick(FOODS)} with {self.pick(FRUITS)}"
        if kind == 4:
            return f"how to {self.pick(VERBS)} a {self.pick(NOUNS)}"
        if kind == 5:
            return " ".join(self.word() for _ in range(rng.randint(2, 5)))
        return f"{self.pick(ADJECTIVES)} {self.pick(ANIMALS)} near the {self.pick(PLACES)}"
