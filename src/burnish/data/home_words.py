"""What people say at home: words for open lists, softened rules, odds, and what nobody says. Data for home_assistant.py."""

from __future__ import annotations

import re

# Words for the lists that a home fills itself. Names hold no room, no floor and none of the words a template may put
# behind a name (light, list, scene, script, floor): so "desk lamp" is always the light called "desk".
ENGLISH = {
    "area": "kitchen|living room|bedroom|bathroom|hallway|office|dining room|garage|laundry room|guest room|nursery|"
    "playroom|library|study|pantry|closet|den|sunroom|conservatory|gym|home theater|workshop|kids room|master bedroom|"
    "entryway|foyer|lounge|studio|utility room|mud room|game room|music room|patio|porch|deck|balcony|garden|backyard|"
    "driveway|shed|wine cellar|sauna|terrace|bar",
    "floor": "first|second|third|ground|top|upper|lower|fourth|upstairs|downstairs|basement|attic|loft|mezzanine",
    "name.light": "chandelier|pendant|spotlights|sconce|led strip|downlights|fairy string|lantern|uplighter|"
    "glow globe|torchiere|neon sign|track spots|candelabra|disco ball|moon globe|hue bulb|glow orb",
    "name.light_stem": "desk|bedside|reading|corner|salt|vanity|cabinet|mirror|aquarium|star|piano|bookshelf|"
    "table|night|picture|workbench|headboard|easel|counter",
    "name.switch": "coffee maker|kettle|toaster|space heater|dehumidifier|humidifier|printer|christmas tree|"
    "water pump|router|electric blanket|iron|fish tank|sprinkler|charger|slow cooker|fountain|bug zapper",
    "name.fan": "ceiling fan|tower fan|desk fan|extractor fan|air purifier|ventilator|box fan|pedestal fan|exhaust fan|air circulator",
    "name.media_player": "tv|television|speaker|radio|sonos|soundbar|stereo|chromecast|apple tv|projector|echo dot|"
    "record player|home pod|jukebox|fire stick|receiver",
    "name.input_boolean": "vacation mode|guest mode|night mode|sleep mode|party mode|away mode|quiet mode|cleaning mode",
    "name.climate": "thermostat|air conditioner|heat pump|radiator|ac|heater|mini split|boiler|underfloor heating|nest|ecobee|hvac",
    "name.cover": "roller blind|venetian blind|skylight|roman shade|projector screen|canopy|sun sail|drapes|hatch|"
    "louvers|pergola roof|sliding panel|velux|pet flap|sunshade|trapdoor",
    "name.valve": "water valve|gas valve|irrigation valve|main valve|drip line|radiator valve|hose valve|drain valve",
    "name.lock": "front door|back door|side door|main entrance|safe|gun cabinet|cellar door|bike lock|mailbox|"
    "storage room door|smart lock|deadbolt|medicine cabinet|pool gate",
    "name.scene": "movie night|romantic dinner|good morning|bedtime|party|relax|sunset|reading time|focus|rainy day|"
    "game night|wake up|christmas eve|yoga|cozy evening|brunch",
    "name.script": "goodnight|leaving home|morning routine|wind down|welcome home|water the plants|lock up|panic|"
    "coffee time|dog walk|holiday lighting|bath time|pizza party|laundry day",
    "name.sensor": "outdoor humidity|power meter|rain gauge|battery level|air quality|water meter|door counter|"
    "soil moisture|co2 level|uv index|solar output|wind speed",
    "name.binary_sensor": "motion sensor|presence sensor|smoke detector|leak sensor|parking spot|bed sensor|"
    "glass break sensor|vibration sensor|doorbell camera|occupancy sensor|driver seat|water alarm",
    "name.person": "Alice|Sam|Maria|Tom|Emma|Noah|Priya|Lucas|Olivia|Ahmed|Sofia|Ben|Chloe|Kenji|Nina|David|Zoe|Martin",
    "name.weather": "London|Berlin|Chicago|Tokyo|Madrid|Oslo|Seattle|Amsterdam|Sydney|Toronto|Denver|Lisbon|Dublin|Austin|Prague",
    "name.vacuum": "roomba|robot vacuum|roborock|hoover|deebot|vacuum robot|dyson|eufy|dreame|vacuum cleaner",
    "name.lawn_mower": "automower|husqvarna|robomow|worx|landroid|mowbot|segway|gardena",
    "name.todo": "to do|groceries|packing|chores|work|hardware store|birthday|homework|party|travel|garden|wish|school|moving|reading",
    "name.button": "doorbell|restart|garage opener|panic|feeder|identify|reset|coffee|fan boost|elevator",
    "shopping_list_item": "milk|eggs|bread|butter|bananas|apples|coffee|olive oil|toilet paper|chicken breast|rice|"
    "pasta|tomatoes|cheese|dish soap|orange juice|cat food|yogurt|potatoes|onions|garlic|dark chocolate|paper towels|"
    "salmon|spinach|honey|flour|batteries|toothpaste|sparkling water|avocados|cereal|ground beef|lemons|peanut butter|"
    "ice cream|carrots|shampoo|green tea|tortillas",
    "todo_list_item": "call mom|pay the rent|book a flight|walk the dog|fix the sink|buy stamps|"
    "return the library books|renew my passport|wash the car|email the landlord|water the plants|order a cake|"
    "clean the gutters|back up the laptop|schedule the dentist|mow the lawn|pick up the kids|send the invoice|"
    "change the air filter|finish the report|iron the shirts|feed the fish|paint the fence|sunscreen|screws|"
    "light bulbs|passport|phone charger|balloons|a new notebook",
    "message": "dinner is ready|the bus leaves in ten minutes|it is time for bed|please come downstairs|"
    "we are leaving now|lunch is served|the movie is about to start|someone is at the door|homework before games|"
    "the pizza has arrived|I am on my way home|breakfast is ready|everybody wash your hands|the laundry is done|"
    "grandma is here|put your shoes on|the meeting starts soon|who took my keys|happy birthday Emma|"
    "the cake is in the oven|turn your music down|the dog needs a walk|school starts in an hour|the game is on",
    "timer_name": "pizza|egg|pasta|laundry|tea|homework|nap|chicken|bread|workout|cookies|rice|meeting|dog walk|oven|"
    "meditation|dishwasher|cake|steak|parking|screen time|potatoes|coffee|roast|yoga",
    "timer_command": "turn off the lights|open the curtains|turn on the tv|lock the front door|start the vacuum|"
    "close the garage door|turn on the heater|play some music|stop the music|turn off the fan|"
    "turn on the coffee maker|close the blinds|dim the lights|turn off the radio|open the gate|unlock the back door|"
    "turn off the oven|pause the movie|turn up the heat|turn on the sprinkler",
    "zone": "home|work|school|office|gym|garden|city|pool|supermarket|hospital|library|airport|park|church",
    "search_query.artist": "queen|taylor swift|the beatles|miles davis|adele|daft punk|bob marley|coldplay|nina simone|radiohead|abba|u2",
    "search_query.album": "thriller|abbey road|kind of blue|rumours|nevermind|back in black|the wall|"
    "random access memories|purple rain|1989",
    "search_query.track": "bohemian rhapsody|hey jude|imagine|yesterday|wonderwall|billie jean|hotel california|smooth operator|africa",
    "search_query.playlist": "chill vibes|workout mix|dinner jazz|road trip|sunday morning|deep focus|summer hits|party starters|lullabies",
    "search_query.podcast": "serial|radiolab|planet money|the daily|this american life|hardcore history|99 percent invisible|song exploder",
    "search_query.movie": "inception|the matrix|frozen|finding nemo|jurassic park|casablanca|toy story|star wars|amelie|the godfather",
    "search_query.tv_show": "friends|the office|breaking bad|stranger things|planet earth|the crown|seinfeld|sherlock|bluey",
}
GERMAN = {
    "area": "Küche|Wohnzimmer|Schlafzimmer|Badezimmer|Flur|Büro|Esszimmer|Garage|Waschküche|Gästezimmer|Kinderzimmer|"
    "Speisekammer|Arbeitszimmer|Wintergarten|Garten|Terrasse|Balkon|Werkstatt|Abstellraum|Diele",
    "floor": "Erdgeschoss|Obergeschoss|Dachgeschoss|Keller|Untergeschoss|Zwischengeschoss",
    "name.light": "Kronleuchter|Stehlampe|Nachttischlampe|Lichterkette|Spot|Leselampe|Leuchtstreifen|Laterne|Tischlampe|Wandlampe",
    "name.switch": "Kaffeemaschine|Wasserkocher|Toaster|Luftbefeuchter|Drucker|Pumpe|Heizdecke|Springbrunnen",
    "name.media_player": "Fernseher|Radio|Lautsprecher|Soundbar|Stereoanlage|Beamer|Plattenspieler|Sonos",
    "name.cover": "Rollladen|Jalousie|Markise|Vorhang|Dachfenster|Tor|Leinwand|Sonnensegel",
    "name.lock": "Haustür|Hintertür|Tresor|Kellertür|Gartentor|Briefkasten|Seiteneingang|Schuppentür",
    "name.person": "Anna|Jonas|Lena|Paul|Marie|Felix|Emilia|Lukas|Sophie|Moritz",
    "shopping_list_item": "Milch|Eier|Brot|Butter|Bananen|Kaffee|Nudeln|Käse|Tomaten|Joghurt|Kartoffeln|Zwiebeln|"
    "Honig|Mehl|Reis|Spülmittel",
    "todo_list_item": "Mama anrufen|Miete zahlen|Auto waschen|Pflanzen gießen|Zahnarzt anrufen|Rasen mähen|"
    "Kuchen bestellen|Müll rausbringen",
    "timer_name": "Pizza|Eier|Nudeln|Wäsche|Tee|Kuchen|Braten|Hausaufgaben",
}
WORDS: dict[str, dict[str, str]] = {"en": ENGLISH, "de": GERMAN}  # a list missing here: the English one

# English, softened. Each rule is a subset of the package's rule of that name (repeated = likelier); ‹in› and ‹the› are
# settled by what follows them (`_settle`).
RULES = {
    "the": "‹the›",
    "in": "‹in›",
    "is": "(is|are)",
    "are": "(is|are)",
    "all": "(all|all the|all of the|all my|every)",
    "everywhere": "(everywhere|in the whole house|in the house|throughout the house|in every room|in the apartment)",
    "here": "(in here|in here|in this room|here)",
    "light": "(lights|lights|lights|light|lamp|lamps)",
    "turn": "(turn|turn|turn|switch)",
    "set": "(set|set|change|make|turn)",
    "numeric_value_set": "(set|set|set|change|turn)",
    "open": "(open|open|open|raise)",
    "close": "(close|close|shut|lower)",
    "which": "(which|what|which of the)",
    "any": "(any|any|any of the)",
    "how_many": "(how many|how many|how many of the)",
    "temp": "(temperature|temperature|temp)",
    "media": "(music|music|movie|tv show|show|media|song)",
    "lockable": "(locks|doors|doors|windows|gates)",
}
# How often an optional part is said, by its first word; the first words of a sentence OPENING, anything else RARE.
# fmt: off
SAID = {
    "<the>": 0.9, "the": 0.9, "a": 0.9, "my": 0.9, "to": 0.99, "is": 0.97, "of": 0.9, "in": 0.97, "on": 0.97,
    "<in>": 1.0, "<are>": 0.97, "<all>": 0.3, "<set>": 0.98, "<numeric_value_set>": 0.98, "turn": 0.97, "how": 0.97,
    "by": 0.97, "and": 0.85, "%": 0.85, "°": 0.7, "k": 0.8, "s": 0.5, "": 0.05, "-": 0.2, "(": 0.3, "it": 0.8,
    "floor": 0.5, "shopping": 0.8, "scene": 0.5, "script": 0.5, "list": 0.98, "mower": 0.0, "securely": 0.1,
    "position": 0.1,
}
# fmt: on
RARE, OPENING = 0.35, 0.95
LATER = 0.6  # each next alternative is so much less likely than the one before

FLOORS = r"(?:first|second|third|fourth|ground|top|upper|lower)"
LEVELS = r"(?:upstairs|downstairs|basement|attic|loft|mezzanine)"
NOUNS = r"(light|lamp|fan|switch|lock|door|window|gate|shutter|blind|curtain|shade|awning)"
BARE = r"(?:home|work|school|upstairs|downstairs)\b(?! theater)"
LEFT_OUT = (  # templates with two readings, or that nobody says
    re.compile(r"\{bs_open_states"),  # "is the … open" asks a cover ("open") or a sensor ("on"): nobody can hear which
    re.compile(r"^\[<the>\] \{name\}( \(play|$)"),  # a bare name; "projector play the previous"
    re.compile(r"timer_(hours|minutes):\1.*:start_seconds|:start_seconds.*timer_(hours|minutes):\2"),  # 3 h off 40 s
)
COLORS = "white|black|red|orange|yellow|green|blue|purple|brown|pink|turquoise"
ODD = re.compile(  # what a template allows and nobody says
    "|".join(
        (
            rf"\b{FLOORS}\b(?! floor)|\b{LEVELS} floor",
            r"\b(?:in|on|of|at|my) (?:up|down)stairs|\bthe (?:up|down)stairs$|\b(?:at|in) home\b",
            r"\b(?:the|my|our|an?|any) (?:the|my|our|there)\b|\b(\w+) \1\b",
            r"\bto (?:on|off|out)\b|\bturn (?:increase|decrease)\b|\bvolume (?:increase|decrease)\b|^make .* to\b",
            r"^(?:volume (?:up|down) (?!by|in |on |\d)|down |(?:up|increase|decrease) volume)",
            r"^(?:raise|lower) .*\b(?:door|gate|window|hatch|panel|flap|valve)s?\b",
            r"\ban timer|\bhalf an? (?:hour|minute)s\b|1/2|-(?:hour|minute) (?:and|\d)|\dkelvin|\d k\b",
            rf"^(?:turn|switch) (?:(?!\b(?:on|off|up|down|out|to|{COLORS})\b).)*$|^(?:activate|run|start) .* on$",
            r"\bspeed fans?\b|^(?:next|previous) (?:item|for)|complete off|scene (?:the|my) |(?:delete|remove) off",
            r"\d %|\boff (?:from|on|in) |\ban (?!8|11|18)\d|\ba (?:8|11|18)\b",
            rf"\bin (?:the |my )?{FLOORS} floor",
            r"^(?:the|my) .* on$|\bin (?:the |my )?(?:patio|porch|deck|balcony|driveway|terrace)\b",
            rf"\b{NOUNS}s? (?:the |my )?(?:basement|attic|loft|mezzanine|{FLOORS})\b",
        )
    ),
    re.IGNORECASE,
)
VERBS = re.compile(
    r"(?:turn|switch|set|change|open|close|shut|raise|lower|lock|unlock|start|stop|pause|play|resume|add|put|remove|"
    r"delete|cancel|mute|unmute|activate|deactivate|run|vacuum|clean|skip|increase|decrease|broadcast|announce|return|"
    r"dock|tell|illuminate|press|push|check)\b"
)
