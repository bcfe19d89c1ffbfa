"""Make the tiny review model, a positive-sentiment potential and a twist head trained for it.

Everything is drawn from ``--seed``: a grammar writes product reviews with a sentiment each, a
byte-level BPE tokenizer and a small Llama learn them, a logistic regression over token counts
learns the sentiment, and CTL trains the twist head towards it.

    python scripts/make_tiny.py

writes models/tiny-reviews, models/tiny-reviews-positive and docs/tiny-model.md; with --head-only, the
head and the page alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_twist.objectives import ctl_loss, log_weights
from vllm_twist.potentials import TokenLogistic, load_potential
from vllm_twist.resampling import ess, log_mean_exp
from vllm_twist.training import TrainingConfig, TwistTrainer
from vllm_twist.training.samplers import DrawRequest, TransformersSampler
from vllm_twist.twist import TwistHead

ROOT = Path(__file__).resolve().parent.parent
SHARPNESS = 1.25
HEAD_TYPE = "mlp"
BATCH, TWIST_BATCH = 64, 128
MAX_TOKENS, LEARNING_RATE = 64, 1e-3
PROMPTS = ("I bought this", "The battery", "My daughter", "This blender", "After two weeks", "This", "The")
UNSEEN_PROMPTS = ("My husband", "We needed", "I have had this laptop for")

# -- The grammar -------------------------------------------------------------------------------
# "{a|b}" picks one, "{name}" stands for a word of the review at hand or for a rule below.

#: Noun, what it is for, where it lives, and its features.
PRODUCTS = (
    ("blender", "make smoothies|crush ice|make soup", "kitchen", "motor lid blade jar button cord"),
    ("coffee maker", "brew coffee|make espresso", "kitchen", "lid filter timer button pot cord"),
    ("toaster", "make toast|warm bagels", "kitchen", "timer lever tray button cord"),
    ("kettle", "boil water|make tea", "kitchen", "lid handle switch spout cord"),
    ("frying pan", "cook eggs|fry fish", "kitchen", "handle coating lid surface"),
    ("knife", "chop onions|slice bread", "kitchen", "blade handle grip"),
    ("lunch box", "carry snacks|pack lunch", "office", "lid lock handle zipper"),
    ("water bottle", "stay hydrated|take on hikes", "gym", "lid straw coating seal"),
    ("vacuum", "clean the rugs|pick up dog hair", "house", "motor hose filter brush battery cord"),
    ("fan", "stay cool|sleep better", "bedroom", "motor blade switch remote cord"),
    ("heater", "warm the room|stay warm", "bedroom", "switch remote timer cord"),
    ("humidifier", "help me sleep|fix the dry air", "bedroom", "tank filter switch light"),
    ("lamp", "read at night|light the hallway", "bedroom", "switch light bulb shade base cord"),
    ("chair", "sit at my desk|work from home", "office", "seat cushion frame back wheel"),
    ("desk", "work from home|do homework", "office", "surface frame drawer leg"),
    ("bookshelf", "hold my books|show my plants", "living room", "frame shelf paint back"),
    ("mattress", "sleep better|help my back", "guest room", "foam cover fabric surface"),
    ("pillow", "sleep better|help my neck", "bedroom", "foam cover fabric shape"),
    ("blanket", "stay warm|nap on the couch", "living room", "fabric color stitching size"),
    ("rug", "cover the floor|brighten the room", "living room", "color fabric pattern backing"),
    ("clock", "wake up on time|hang on the wall", "bedroom", "alarm display battery button"),
    ("camera", "take pictures|record our trips", "house", "lens battery screen zoom strap"),
    ("tablet", "watch movies|read books", "car", "screen battery speaker charger camera"),
    ("laptop", "write papers|work on the road", "office", "screen battery keyboard fan charger"),
    ("phone", "call my family|take pictures", "office", "screen battery camera speaker charger"),
    ("phone case", "protect my phone", "car", "color grip button coating"),
    ("charger", "charge my phone", "car", "cable plug light cord"),
    ("keyboard", "type faster|play games", "office", "key cable battery light"),
    ("speaker", "play music|listen to podcasts", "garage", "sound bass battery volume button"),
    ("microphone", "record songs|make calls", "office", "sound cable stand switch"),
    ("television", "watch football|watch movies", "living room", "screen picture sound remote"),
    ("printer", "print photos|print labels", "office", "ink tray paper feed screen cable"),
    ("router", "stream movies|work from home", "house", "signal antenna range cable"),
    ("drill", "build shelves|hang pictures", "garage", "motor battery trigger grip charger"),
    ("flashlight", "walk the dog|find the breaker", "garage", "light battery switch lens grip"),
    ("ladder", "clean the gutters|paint the walls", "garage", "frame lock step hinge"),
    ("tent", "go camping|sleep outside", "yard", "zipper fabric pole floor seam"),
    ("grill", "cook burgers|grill chicken", "yard", "lid handle wheel tray"),
    ("hose", "water the plants|wash the car", "yard", "nozzle valve fitting length"),
    ("backpack", "carry my books|travel for work", "office", "zipper strap pocket fabric lining"),
    ("suitcase", "travel for work|fly home", "car", "wheel zipper handle lock lining"),
    ("umbrella", "stay dry|walk to work", "car", "handle frame fabric button"),
    ("jacket", "stay warm|go running", "office", "zipper fabric lining pocket hood"),
    ("watch", "tell the time|track my runs", "gym", "strap battery screen clasp"),
    ("bike", "ride to work|exercise", "garage", "seat frame chain brake wheel"),
    ("yoga mat", "stretch|exercise", "gym", "surface color strap grip"),
    ("puzzle", "pass the time|play with the kids", "living room", "box picture color fit"),
    ("doll", "play with", "house", "hair dress face box"),
    ("board game", "play with the kids|pass the time", "living room", "box board fit"),
    ("toy truck", "play with|play outside", "yard", "wheel paint battery remote"),
    ("guitar", "practice at home|learn a few songs", "living room", "sound neck string strap"),
    ("book", "learn to cook|read on the train", "bedroom", "story cover paper print ending"),
    ("hair dryer", "dry my hair|style my hair", "bathroom", "motor switch cord handle filter"),
    ("razor", "shave my head|trim my beard", "bathroom", "blade battery grip charger"),
    ("toothbrush", "clean my teeth|brush twice a day", "bathroom", "battery handle brush charger"),
    ("scale", "track my weight|weigh flour", "bathroom", "display battery surface base"),
    ("mirror", "check my makeup|fix my hair", "bathroom", "frame light base surface"),
    ("air fryer", "make crispy fries|reheat pizza", "kitchen", "basket timer fan coating"),
    ("mixer", "bake cookies|knead dough", "kitchen", "motor bowl switch cord"),
    ("cutting board", "chop vegetables|carve turkey", "kitchen", "surface handle size"),
    ("teapot", "brew green tea|serve guests", "kitchen", "lid spout handle color"),
    ("mug", "drink cocoa|take to meetings", "office", "handle lid coating color"),
    ("candle", "relax after work|hide the smell of the litter", "bathroom", "scent glass wick lid"),
    ("stroller", "take the baby out|go shopping", "garage", "wheel brake frame cushion strap"),
    ("crib", "put the baby to sleep|convert to a bed later", "nursery", "frame rail paint wheel"),
    ("dog bed", "comfort our puppy|replace the sofa", "basement", "foam cover zipper fabric"),
    ("leash", "walk our puppy|train our beagle", "yard", "clasp handle stitching length"),
    ("aquarium", "raise goldfish|start a hobby", "living room", "filter pump light glass seal"),
    ("bird feeder", "attract cardinals|watch finches", "yard", "roof perch tray paint"),
    ("sleeping bag", "camp in the mountains|stay warm at night", "cabin", "zipper lining fabric size"),
    ("cooler", "keep drinks cold|store fish", "boat", "lid seal wheel handle drain"),
    ("fishing rod", "catch trout|fish with grandpa", "boat", "reel grip tip length"),
    ("basketball", "shoot hoops|practice dribbling", "gym", "surface grip valve color"),
    ("helmet", "ride safely|go skating", "garage", "strap visor padding fit"),
    ("skateboard", "learn tricks|get to class", "dorm room", "wheel deck bearing paint"),
    ("treadmill", "jog indoors|lose ten pounds", "basement", "motor belt display frame"),
    ("wallet", "hold my cards|organize cash", "office", "leather stitching clasp pocket"),
    ("purse", "carry everything|match my outfit", "car", "strap zipper leather lining"),
    ("necklace", "wear on dates|wear at our wedding", "bedroom", "chain clasp stone color"),
    ("sweater", "layer under a coat|survive the cold", "office", "fabric color fit stitching"),
    ("dress", "wear to a party|wear at graduation", "apartment", "fabric color zipper fit length"),
    ("hat", "block the wind|hide my bald spot", "cabin", "brim color fit stitching"),
    ("notebook", "take notes|keep a journal", "classroom", "cover paper binding"),
    ("calculator", "teach algebra|do taxes", "classroom", "display key battery"),
    ("monitor", "edit videos|see two documents at once", "office", "screen stand cable picture"),
    ("mouse", "design logos|play games", "office", "wheel sensor battery button"),
    ("hard drive", "back up files|store old movies", "office", "cable light case"),
    ("drone", "film the lake|fly at the park", "cabin", "camera battery propeller remote range"),
    ("piano", "teach my students|practice scales", "living room", "key pedal sound stand"),
    ("thermostat", "save on heating|control the temperature", "apartment", "screen sensor signal battery"),
    ("doorbell", "see visitors|catch thieves", "apartment", "camera button signal battery"),
    ("saw", "cut lumber|prune branches", "garage", "blade motor trigger grip"),
    ("hammer", "fix the fence|build a treehouse", "garage", "handle head grip"),
    ("lawn mower", "mow the lawn|tame the weeds", "yard", "motor blade wheel handle"),
    ("sprinkler", "water the lawn|cool off the children", "yard", "nozzle valve hose timer"),
    ("flower pot", "grow basil|repot my fern", "balcony", "saucer drain color glaze"),
    ("hammock", "nap outdoors|read in the shade", "yard", "rope fabric hook stand"),
    ("projector", "host movie nights|present slides", "basement", "lens bulb fan remote picture"),
)
#: Things that come in twos take other verbs.
PLURALS = (
    ("headphones", "listen to music|take calls", "gym", "sound bass battery microphone cable"),
    ("shoes", "go running|walk to work", "gym", "sole fit color stitching"),
    ("boots", "go hiking|work outside", "yard", "sole zipper leather lining"),
    ("gloves", "stay warm|work in the garden", "yard", "grip lining fabric fit"),
    ("jeans", "wear to work|wear at home", "office", "zipper fabric color waist"),
    ("towels", "dry the dishes|use at the pool", "house", "fabric color stitching size"),
    ("curtains", "block the sun|keep the heat out", "bedroom", "fabric color length lining"),
    ("batteries", "power my remote|run the toys", "house", "charge price seal"),
    ("scissors", "cut paper|trim plants", "garage", "blade handle grip"),
    ("earrings", "wear on weekends|match my necklace", "bedroom", "clasp stone color"),
    ("binoculars", "spot eagles|watch the opera", "cabin", "lens strap focus grip"),
    ("socks", "keep my toes warm|wear in boots", "dorm room", "fabric color fit stitching"),
    ("pajamas", "lounge around|sleep in", "bedroom", "fabric waist color length"),
    ("sunglasses", "drive to work|go to the beach", "car", "lens frame color hinge"),
)

#: What features may do, well or badly; those that no line names fall under "other".
FEATURES = {
    "battery": (
        "lasts all day|lasts for {days}|charges {quickly|in an hour|fast}|holds a charge for {days}|still lasts {days}",
        "dies after {an hour|ten minutes|a few hours}|{barely|hardly} holds a charge|drains {overnight|far too fast}"
        "|swelled up after {days}|takes forever to charge|stopped charging after {days}",
    ),
    "charge": ("lasts for {days}|is strong", "is gone in {an hour|a day}|fades {far too fast|overnight}"),
    "screen display picture": (
        "is bright and {clear|sharp}|looks {beautiful|stunning|sharp}|is easy to {see|read}",
        "flickers {all the time|at night}|is too dim to {see|read}|went black after {days}|is {blurry|dull}",
    ),
    "sound bass volume": (
        "is {crisp|clear|rich} and {loud|full|warm}|fills the {whole|entire} room|is {amazing|excellent}",
        "is {tinny|muffled|flat}|cuts out {constantly|every few minutes}|is full of static|is too {low|quiet}",
    ),
    "motor": (
        "is {quiet|powerful|strong}|runs {quietly|smoothly}|has plenty of power|never slows down",
        "{burned out|died|started smoking} after {days}|smells like {burning plastic|smoke}|is {loud|weak|way too loud}"
        "|overheats {constantly|in minutes}",
    ),
    "zipper clasp lock": (
        "{slides|closes} {smoothly|easily}|feels {sturdy|strong}|never gets stuck",
        "{broke|got stuck|came off} {after {days}|the first time i used it|on the first day}|{sticks|jams} "
        "{constantly|every time}",
    ),
    "fabric foam lining leather cushion": (
        "is {soft|thick|warm} and {strong|comfortable}|feels {soft|expensive|lovely}|is easy to clean",
        "is {thin|scratchy|cheap} and {rough|itchy|weak}|{ripped|tore|went flat} after {days}"
        "|smells {awful|like chemicals}",
    ),
    "color pattern paint": (
        "is {beautiful|bright|gorgeous}|looks exactly like the picture|matches our {couch|walls|house}",
        "looks nothing like the picture|{faded|wore off} after {days}|is {dull|ugly|completely wrong}",
    ),
    "fit size length waist shape": (
        "is {perfect|just right}|is exactly what {i|we} needed",
        "is {too small|all wrong|way off}|is not as described",
    ),
    "blade": (
        "is {very|razor} sharp|cuts through {anything|everything}|stays sharp for {days}|is easy to clean",
        "{went dull|rusted|snapped} after {days}|is {dull|loose}|cannot cut {paper|anything}",
    ),
    "handle grip": (
        "feels {solid|sturdy|great}|is {comfortable|easy} to hold|never slips",
        "{broke|snapped|fell|came} off {after {days}|in my hand|on the first day}|is {loose|wobbly|slippery}",
    ),
    "lid seal valve spout": (
        "{seals|closes} {tightly|perfectly}|never leaks|is easy to {clean|open}",
        "{leaks|pops off} {constantly|every time}|does not {close|seal|fit}|cracked after {days}",
    ),
    "button switch trigger lever key": (
        "is easy to {press|find|use}|works every time|feels {solid|sturdy}",
        "{sticks|jams|fell off} {after {days}|for no reason}|stopped working after {days}|barely works",
    ),
    "timer alarm filter feed plug charger remote microphone": (
        "works {perfectly|every time|well}|is {easy|simple} to use|does the job",
        "{stopped working|died|failed} after {days}|never worked|is {useless|confusing}",
    ),
    "light bulb": (
        "is {bright|warm|strong}|lights up the {whole|entire} room|has just the right glow",
        "is {dim|weak}|flickers {all the time|at night}|went out after {days}|is far too {bright|harsh}",
    ),
    "camera": (
        "takes {sharp|beautiful|great} {pictures|photos}|works well in low light|focuses {quickly|right away}",
        "takes {blurry|grainy|awful} {pictures|photos}|will not focus|is useless at night",
    ),
    "signal range": (
        "reaches every room|is {strong|steady}|never drops",
        "drops {constantly|every few minutes}|is {weak|useless}",
    ),
    "story": (
        "is {gripping|funny|moving}|kept me up all night|gets better with every page",
        "is {boring|predictable|confusing}|goes nowhere|put me to sleep",
    ),
    "ending": ("made me cry|is {perfect|a wonderful surprise}", "makes no sense|is {rushed|disappointing}"),
    "scent": ("is {fresh|subtle|pleasant}|lingers for hours", "is {overpowering|fake|faint}|gives me a headache"),
    "stone glass": (
        "{sparkles|shines} in the sun|is {flawless|polished}|catches every eye",
        "{chipped|fell out} after {days}|is {scratched|cloudy|plastic}|shattered in the mail",
    ),
    "fan pump belt bearing propeller": (
        "{spins|runs} {smoothly|quietly}|is almost silent",
        "{rattles|squeaks|grinds} {constantly|at night}|jammed after {days}",
    ),
    "sensor focus reel": (
        "is {accurate|precise|responsive}|reacts instantly",
        "is {inaccurate|erratic|laggy}|quit after {days}",
    ),
    "price": ("is {fair|great|hard to beat}|was a steal", "is {too high|a joke}|was a rip off"),
    "other": (
        "is {very |really |surprisingly |}{sturdy|solid|well made|excellent|perfect|nice}"
        "|feels {sturdy|solid|expensive|great|well made}|still looks {new|perfect|great} after {days}"
        "|is better than i expected|holds up {well|perfectly}",
        "{broke|cracked|came loose|fell apart|wore out} {after {days}|on the first day|almost immediately}"
        "|is {very |really |already |}{cheap|flimsy|loose|wobbly|useless|defective|poorly made}"
        "|feels {cheap|flimsy|weak|poorly made}|arrived {bent|cracked|scratched|broken|dirty}|was {missing|damaged}",
    ),
}
FEATURES = {feature: rule for names, rule in FEATURES.items() for feature in names.split()}
#: Features of things that are switched on, and of things that are put together.
POWERED = frozenset("motor battery switch screen cord timer signal sound alarm".split())
ASSEMBLED = POWERED | frozenset("frame drawer shelf pole wheel nozzle".split())

PEOPLE = (
    *((who, "she", "her") for who in "daughter wife mother sister aunt niece grandmother granddaughter".split()),
    *((who, "she", "her") for who in "daughter girlfriend roommate teacher".split()),
    *((who, "he", "his") for who in "son husband father brother uncle nephew grandfather grandson".split()),
    *((who, "he", "his") for who in "son boyfriend boss neighbor cousin".split()),
)

DAYS = (
    "two weeks|two weeks|a week|three days|a month|two months|six months|a few days|ten days|three weeks|a few weeks"
    "|several months|one week|a year"
)
#: Rules without a sentiment.
RULES = {
    "when": "last {month|week|year|summer|winter|spring}|a month ago|{two|three} weeks ago|on sale|online"
    "|at full price|after reading the reviews|on a whim|for {christmas|the holidays|our trip|a trip|school|college}",
    "thing": "{this} {||||new|small|black|white|blue|red|green|pink|gray|purple|large|fancy|cheap|popular} {noun}",
    "detail": "i mostly use {them} to {use_for}|{person} and i share {them}|i keep {them} in {the|my} {place}"
    "|i chose the {black|white|blue|red|green|gray|purple|orange|yellow|brown} {one}"
    "|{it} {comes} in a {plain|large|small} box"
    "|i do not usually write reviews|i {live alone|work nights|retired in june|travel often}"
    "|it was {raining|snowing} all week"
    "|i have {two dogs|three kids|a small house|a bad back|big hands}"
    "|i {compared|looked at} {many|several} brands {first|online}",
    "old": "my old {one}|the {one} that broke|the {cheap|worn out} {one} i had|the {one} i lost",
    "aim": "to {use_for}|for {person}|for {our|the|my} {place}|to replace {old}|as a gift for {person}"
    "|so that i could {use_for}",
    "start": "i {bought|bought|ordered|got|purchased|picked up} {thing} {{aim}|{when}|{aim} {when}}{||| {started}}"
    "|{person} {wanted|needed|asked for} {thing} {to {use_for}|for {his} {birthday|new apartment|trip|new job}}"
    "|i have {had|owned|used} {thing} for {days}|we needed {thing} for {our|the} {place}"
    "|i was {looking for|trying to find} a {good |cheap |better |}way to {use_for}"
    "|i {got|received} {thing} {for my birthday|as a gift}{||| {started}}"
    "|{person} {gave|bought|got} me {thing} {for my birthday|for christmas|last {month|year}}"
    "|i read {many|all the} reviews before buying {this} {noun}",
    "failed powered": "died|quit|stopped working|would not turn on|gave up|broke|stopped charging",
    "failed": "broke|fell apart|came apart|wore out|was ruined|ended up in the trash",
}
#: Rules in two versions, good and bad.
SENTIMENT_RULES = {
    "opinion": (
        "great|fantastic|wonderful|excellent|perfect|awesome|amazing|beautiful|lovely|terrific|brilliant|superb"
        "|outstanding|impressive|delightful|fabulous",
        "terrible|awful|horrible|useless|disappointing|junk|poor|garbage|worthless|dreadful|pathetic|mediocre|shoddy"
        "|miserable|a scam",
    ),
    "opener": (
        "{great|fantastic|wonderful|excellent|amazing|lovely} {noun}|{i |}love {this} {noun}"
        "|{best|nicest} {noun} i have ever {owned|used|bought}|{this} {noun} {is} {simply |absolutely |just |}{opinion}"
        "|i am so {happy|pleased} with {this} {noun}|what a {great|wonderful|lovely} {surprise|find}"
        "|five stars for {this} {noun}|{this} {noun} {does} exactly what {it} should"
        "|i was {skeptical|worried} at first, but {this} {noun} {won me over|surprised me|{does} the job}"
        "|i {use|rely on} {this} {noun} {every day|all the time|every week} and {love {them}|could not be happier}",
        "{terrible|awful|horrible|useless|disappointing|poor} {noun}|do not buy {this} {noun}"
        "|{worst|cheapest} {noun} i have ever {owned|used|bought}"
        "|{this} {noun} {is} {simply |absolutely |just |}{opinion}|i am so {disappointed|unhappy} with {this} {noun}"
        "|what a {waste of money|letdown|disappointment}"
        "|one star for {this} {noun}|{this} {noun} {does} not do what {it} should|stay away from {this} {noun}"
        "|i {had high hopes|was excited} at first, but {this} {noun} {let me down|disappointed me|{is} junk}"
        "|i {really |}wanted to like {this} {noun}, but {i could not|{it} let me down|i cannot recommend {them}}",
    ),
    "started": (
        "and {i am very happy|i love {them}|could not be happier|{it} {does} not disappoint|so far so good}",
        "and {i am very disappointed|i regret it|wish i had not|{it} {failed} {right away|on the first day}}",
    ),
    "after": ("after|even after", "after|after|after less than|after only"),
    "used": (
        "{it} still {works} {perfectly|like new|great}|{it} {looks} as good as new|i am still {happy|impressed}"
        "|{it} {has} not let me down|i use {them} {every day|more than ever}|{it} {keeps} getting better"
        "|the {feature} still looks new|i cannot imagine life without {them}",
        "{it} {failed}|{it} {failed}|i {gave up|stopped using {them}}"
        "|the {feature} {broke|fell off|failed|came apart|was ruined}|{it} {looks} {old|worn out|terrible}"
        "|i had to {throw {them} away|replace {them}}",
    ),
    "family": (
        "{loves|adores|enjoys} {them}|uses {them} {every day|all the time|every weekend|constantly}"
        "|was {thrilled|delighted|so happy} with {them}|asked for {a second one|more}|{recommends|praises} {them}"
        "|says {it} {is} {opinion}"
        "|will not stop talking about {them}",
        "{hates|hated|cannot stand} {them}|stopped using {them} after {days}"
        "|was {disappointed|upset|annoyed} with {them}|cried when {it} {failed}|says {it} {is} {opinion}"
        "|refuses to use {them}|sent {them} back|{complains|laughed} about {them}",
    ),
    "delivery": (
        "{it} arrived {two days early|ahead of schedule|on time|the next day}{| and well packed| in perfect shape}"
        "|shipping was {fast|quick|free and fast}|the package was {well packed|in perfect shape}"
        "|delivery was {quick|fast|early}",
        "{it} arrived {a week late|two weeks late|broken|with a missing part|in a damaged box}"
        "|shipping {took forever|took a month|was slow}|the package was {crushed|open|damaged|empty}"
        "|delivery was {slow|late}",
    ),
    "setup": (
        "{setup|assembly} {was easy|took five minutes|was a breeze}|{it} {was} easy to set up"
        "|the instructions {were|are} clear|it took only a few minutes to set up",
        "{setup|assembly} {was a nightmare|took hours|was impossible}|{it} {was} hard to set up"
        "|the instructions {make no sense|were missing|are useless}|it took me all day to set up",
    ),
    "service": (
        "customer service {was helpful|answered right away|sent a new one for free|was friendly and quick}",
        "customer service {was rude|never answered|refused to help|hung up on me|was useless}",
    ),
    "compare": (
        "{it} {is} {much |so much |far |}{better|nicer|better made} than {old}"
        "|{it} {beats} {anything i have tried|my expensive {one}|every other brand}",
        "{it} {is} {much |so much |far |}{worse|more fragile} than {old}"
        "|my old {one} {was} {much better|better made}|every other brand is better",
    ),
    "value": (
        "{it} {is} worth every penny|{it} {is} {well |}worth the {money|price}"
        "|{it} {is} {a great|a good|an excellent} value|for the price, you cannot {beat {them}|go wrong}"
        "|i would have paid {more|twice as much}",
        "{it} {is} not worth {a penny|the money|the price}|{it} {is} a {complete |total |}waste of {money|time}"
        "|{it} {is} {way |far |}too expensive for what you get|you get what you pay for"
        "|i paid {too much|good money} for {junk|nothing}",
    ),
    "so": (
        "so i bought {another one|one for {person}|two more}|so i am keeping {them}|so i told all my friends"
        "|so i will buy from this {brand|seller} again|so i am giving {them} five stars",
        "so i am sending {them} back|so i returned {them}|so i threw {them} away|so i asked for a refund"
        "|so i will never buy this brand again|so i am giving {them} one star|so i went back to my old {one}",
    ),
    "verdict": (
        "{i |}highly recommend {them}|i would {definitely |gladly |}buy {them} again|you will not regret it"
        "|i {could not be happier|am very pleased|love {them}}|five stars|a great buy|thank you|{buy|get} one today"
        "|i {recommend {them} to everyone|am buying another one}|i am very happy with {this} {noun}"
        "|{this} {noun} made {a great gift|my life easier|my day}",
        "i do not recommend {them}|i would {never |not |}buy {them} again|save your money|you will regret it"
        "|i {want my money back|am very disappointed|want a refund}|one star|{look elsewhere|avoid {them}}|never again"
        "|i {would not give {them} to anyone|am sending {them} back}|i am very unhappy with {this} {noun}"
        "|{this} {noun} {belongs|ended up} in the trash|buy a different brand",
    ),
    "problem": ("the only {problem|downside} is that", "the only good {thing|part} is that"),
}
#: Sentences about the thing; "!" turns the sentiment of a hole around.
MIDDLES = {
    "feature": "{{also, |}{clause}|{clause}}",
    "pair": "{clause} and {clause}",
    "mixed": "{!clause}, but {clause}",
    "only": "{problem} {!clause}",
    "used": "{after} {days}, {used}",
    "family": "{someone} {family}",
    "delivery": "{delivery}",
    "setup": "{setup}",
    "service": "{service}",
    "compare": "{compare}",
    "value": "{value}",
}


@functools.cache
def parse(template: str) -> list[list[tuple[bool, str]]]:
    """Split a template into its alternatives, each a list of (is a hole, text)."""
    alternatives: list[list[tuple[bool, str]]] = [[]]
    depth = start = 0
    for i, char in enumerate(template + "|"):
        if depth == 0 and char in "{|":
            alternatives[-1].append((False, template[start:i]))
            start = i + 1
            if char == "|":
                alternatives.append([])
        depth += (char == "{") - (char == "}")
        if depth == 0 and char == "}":
            alternatives[-1].append((True, template[start:i]))
            start = i + 1
    return alternatives[:-1]


class Review:
    """One review in the making: what its words refer to, and which sentiment it leans to."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.positive = rng.random() < 0.47
        plural = rng.random() < 0.12
        noun, use_for, place, features = rng.choice(PLURALS if plural else PRODUCTS)
        self.features = rng.sample(features.split(), k=len(features.split()))
        self.powered = not POWERED.isdisjoint(self.features)
        self.assembled = not ASSEMBLED.isdisjoint(self.features)
        person, self.he, his = rng.choice(PEOPLE)
        self.person_known = False
        names = "this it them is was does has works looks keeps beats comes"
        forms = "these they them are were do have work look keep beat come" if plural else names.replace("them", "it")
        self.words = dict(zip(names.split(), forms.split(), strict=True))
        self.words |= {"noun": noun, "use_for": rng.choice(use_for.split("|")), "place": place, "his": his}
        self.words["days"] = self.expand(DAYS, self.positive)
        self.words |= {"one": "ones" if plural else "one", "person": f"my {person}"}

    def expand(self, template: str, positive: bool) -> str:
        """Return the template with one choice made for every hole, in words of this sentiment."""
        parts = self.rng.choice(parse(template))
        return "".join(self._fill(text, positive) if hole else text for hole, text in parts)

    def _fill(self, hole: str, positive: bool) -> str:
        if "|" in hole:
            return self.expand(hole, positive)
        if hole[0] == "!":
            return self._fill(hole[1:], not positive)
        if hole == "failed" and self.powered:
            hole = "failed powered"
        if hole == "feature":
            return self.features.pop() if self.features else "box"
        if hole == "clause":
            feature = self._fill("feature", positive)
            return f"the {feature} {self.expand(FEATURES.get(feature, FEATURES['other'])[not positive], positive)}"
        if hole == "someone":  # by name at first, then he or she
            known, self.person_known = self.person_known, True
            return self.he if known else self.words["person"]
        if hole == "person":
            self.person_known = True
        if hole in self.words:
            return self.words[hole]
        return self.expand(RULES[hole] if hole in RULES else SENTIMENT_RULES[hole][not positive], positive)

    def write(self) -> str:
        """Return the text: a start, one to three sentences about the thing, and mostly an ending."""
        start = self.rng.random()
        sentences = []
        if start < 0.55:
            sentences.append("{start}")
        elif start < 0.75:
            sentences.append("{opener}")
        middles = ["feature"] * 3 + ["pair"] * 2 + ["mixed", "only", "used", "used", "family", "family"]
        middles += ["delivery", "service", "compare", "value"] + ["setup"] * self.assembled
        kinds = self.rng.sample(middles, k=self.rng.choice((1, 2, 2, 3)))
        sentences += [MIDDLES[kind] for kind in dict.fromkeys(kinds)]
        if self.rng.random() < 0.25:
            sentences.insert(self.rng.randrange(1, len(sentences) + 1), "{detail}")
        end = self.rng.random()
        if end < 0.3:  # what is done about it follows from what was found
            sentences[-1 if self.rng.random() < 0.5 else len(sentences) :] = ["{clause}, {so}"]
        elif end < 0.8:
            sentences.append("{verdict}")
        return " ".join(self._sentence(template) for template in sentences)

    def _sentence(self, template: str) -> str:
        text = self.expand(template, self.positive)
        text = re.sub(r"  +", " ", text)
        text = re.sub(r"\bi\b", "I", text).replace("christmas", "Christmas").replace("june", "June")
        mark = "!" if self.positive and self.rng.random() < 0.12 else "."
        return text[0].upper() + text[1:] + mark


# -- The language model ------------------------------------------------------------------------
SPECIAL = ("<pad>", "<bos>", "<eos>")
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 2048 tokens that puts <bos> in front."""
    pad, bos, eos = SPECIAL
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of 1.07 million parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train_model(model: LlamaForCausalLM, tokenizer, rng: random.Random, steps: int) -> list[float]:
    """Train the model on fresh reviews, one per row, and return the loss of every step (nats per token)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    losses: list[float] = []
    batches: list[list[list[int]]] = []
    model.train()
    for _ in (bar := tqdm(range(steps), "language model")):
        if not batches:  # rows of like length go together, so that little of a batch is padding
            rows = tokenizer([Review(rng).write() for _ in range(32 * BATCH)]).input_ids
            rows.sort(key=len)
            batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            rng.shuffle(batches)
        rows = [torch.tensor([*row, tokenizer.eos_token_id]) for row in batches.pop()]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = inputs.masked_fill(inputs == tokenizer.pad_token_id, -100)
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / 20:.3f}")
    return losses


# -- The potential -----------------------------------------------------------------------------
def train_potential(tokenizer, rng: random.Random, count: int = 12_000) -> tuple[TokenLogistic, float]:
    """Fit a logistic regression on labelled reviews; return it with its accuracy on unseen ones."""
    reviews = [Review(rng) for _ in range(count)]
    rows = tokenizer([review.write() for review in reviews], add_special_tokens=False).input_ids
    counts = torch.zeros(count, len(tokenizer))
    for i, row in enumerate(rows):
        counts[i] = torch.bincount(torch.tensor(row), minlength=len(tokenizer))
    labels = torch.tensor([float(review.positive) for review in reviews])
    weights, bias = torch.zeros(len(tokenizer), requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=0.03)
    held_out = count // 6
    for _ in tqdm(range(200), "potential"):
        logits = counts[held_out:] @ weights + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[held_out:])
        loss = loss + 3e-4 * weights.square().sum()  # keeps phi away from 0 and 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = ((counts[:held_out] @ weights + bias > 0) == labels[:held_out].bool()).float().mean().item()
    return TokenLogistic(round(bias.item(), 4), [round(w, 4) for w in weights.tolist()]), right


def save_model(model: LlamaForCausalLM, tokenizer, folder: Path) -> None:
    """Write model and tokenizer, the weights in bfloat16."""
    model.to(torch.bfloat16)
    # A model this small leaves too much probability to words that do not fit. The norm before the
    # LM head takes the factor, so that the shipped logits need no temperature.
    model.model.norm.weight.data *= SHARPNESS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- The twist head ----------------------------------------------------------------------------
@torch.no_grad()
def evaluate(trainer: TwistTrainer, prompt: str, count: int, seed: int, laws: tuple[str, ...] = ("p0", "q")) -> dict:
    """Return figures of ``count`` outputs of each law, with the loss of the head on those of q."""
    prompt_ids = tuple(trainer.tokenizer(prompt).input_ids)
    sampler = TransformersSampler(trainer.model, trainer.end_ids)
    sampler.set_head(trainer.head)
    figures = {}
    for law in laws:
        (draws,) = sampler.sample([DrawRequest(prompt_ids, count, law, seed, MAX_TOKENS)])
        texts = trainer.tokenizer.batch_decode(draws.token_ids, skip_special_tokens=True)
        log_phi = torch.tensor(trainer.potential(draws.token_ids, texts))
        scores = trainer.score(prompt_ids, draws.token_ids)
        log_q = scores.log_p if law == "p0" else scores.log_q
        log_w = log_weights(scores.log_p, log_q, log_phi, scores.mask)
        figures[law] = {
            "positive": log_phi.exp().mean().item(),
            "ess": ess(log_w).item() / count,
            "kl": (log_mean_exp(log_w) - log_w.mean()).item(),
            "length": scores.mask.sum(1).float().mean().item(),
            "texts": [prompt + text for text in texts[:3]],
        }
    figures["loss"] = ctl_loss(scores.log_psi, scores.log_p, log_q, log_phi, scores.mask).item()
    return figures


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def report(figures: dict[str, dict], facts: dict) -> str:
    """Return docs/tiny-model.md."""
    rows = "\n".join(
        f"| {prompt}{'' if prompt in PROMPTS else ' *'} | {f['p0']['positive']:.2f} | {f['q']['positive']:.2f} "
        f"| {f['p0']['ess']:.2f} | {f['q']['ess']:.2f} | {f['p0']['kl']:.2f} | {f['q']['kl']:.2f} |"
        for prompt, f in figures.items()
    )
    texts = "\n\n".join(
        f"**{prompt}**\n\n" + "\n".join(f"- {name}: {text}" for name in ("p0", "q") for text in f[name]["texts"])
        for prompt, f in list(figures.items())[:5]
    )
    return REPORT.format(rows=rows, texts=texts, **facts)


REPORT = """# The tiny review model

`models/tiny-reviews` writes short product reviews; `models/tiny-reviews-positive` is a twist head that makes them
positive. They are small enough to come with the repository and to run on any CPU, so that examples and tests need no
download. Both are made from nothing but a seed:

    python scripts/make_tiny.py

gives the same losses on every run with the same versions and number of threads; `--head-only` makes the head anew for
the model that is there. This page is written by that command.

- **Corpus**: {reviews:,} reviews of {products} kinds of products, written by a grammar; about half of them are
  positive, and what a review ends with follows from what it says before.
- **Tokenizer**: byte-level BPE with {vocab} tokens, `<pad>`, `<bos>` and `<eos>` included. It puts `<bos>` in front;
  every review ends with `<eos>`. The chat template joins the texts of the messages.
- **Model**: a Llama of {parameters:.2f} million parameters (4 layers of width 128, 4 heads of 32, a context of 512),
  stored in bfloat16. Its logits are scaled by {sharpness:g} after training, which keeps slips rare.
- **Potential**: phi = p(positive), a logistic regression over token counts that is right on {accuracy:.1%} of unseen
  reviews. `models/tiny-reviews-positive/potential.json` holds `bias` and, for every token, one of `weights`:
  phi = sigmoid(bias + the sum of the weights of the output's tokens).
- **Twist head**: `{head_type}`, trained by CTL in {twist_steps} updates on {twist_batch} outputs of at most
  {max_tokens} tokens, which the engine drew with the head as it was; Adam at {learning_rate:g},
  {threads} CPU thread(s); stored in bfloat16.

The prompts are the first words of a review, such as "I bought this" or "After two weeks".

## Figures

The language model's loss goes from {lm_start:.2f} to {lm_end:.3f} nats per token. The CTL loss, 0 at psi = 1, goes from
{ctl_start:.3f} to {ctl_end:.3f} nats (mean over the prompts that the head was trained on). The mean p(positive) of an
output is **{positive_p0:.2f} under the model (p0) and {positive_q:.2f} under the twisted proposal (q)**. An output has
{length_p0:.0f} tokens on average under p0 and {length_q:.0f} under q.

By prompt, from {count} outputs each; a star marks prompts that the head was not trained on. ESS is the effective
sample size of the importance weights towards the target p0 phi, as a fraction of the outputs; KL is the divergence from
the target, KL(p0 || target) or KL(q || target), in nats.

| prompt | p(positive), p0 | p(positive), q | ESS, p0 | ESS, q | KL, p0 | KL, q |
|---|---|---|---|---|---|---|
{rows}

## Samples

The first three outputs of each, not picked, p0 and q from the same seed.

{texts}
"""


def make_base(args: argparse.Namespace, base_folder: Path, head_folder: Path) -> dict:
    """Write the language model and the potential; return what there is to tell of their training."""
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer([Review(rng).write() for _ in range(20_000)])
    model = make_model(tokenizer)
    losses = train_model(model, tokenizer, rng, args.steps)
    save_model(model, tokenizer, base_folder)
    potential, accuracy = train_potential(tokenizer, rng)
    head_folder.mkdir(parents=True, exist_ok=True)
    potential.save(head_folder / "potential.json")
    return {
        "reviews": args.steps * BATCH,
        "lm_start": losses[0],
        "lm_end": mean(losses[-50:]),
        "accuracy": accuracy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder for both models")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "tiny-model.md", help="file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the language model")
    parser.add_argument("--twist-steps", type=int, default=500, help="updates of the twist head")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch; the losses depend on it")
    parser.add_argument("--head-only", action="store_true", help="keep the language model and the potential")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    base_folder, head_folder = args.models / "tiny-reviews", args.models / "tiny-reviews-positive"
    facts_path = head_folder / "facts.json"
    facts = json.loads(facts_path.read_text()) if args.head_only else make_base(args, base_folder, head_folder)

    options = {"max_tokens": MAX_TOKENS, "particles": TWIST_BATCH, "lr": LEARNING_RATE, "seed": args.seed}
    config = TrainingConfig(objective="ctl", head=HEAD_TYPE, updates=args.twist_steps, sampler="vllm", **options)
    with TwistTrainer(base_folder, load_potential(head_folder), config) as trainer:
        trainer.train(PROMPTS, progress=True)
        trainer.head.to(torch.bfloat16).save_pretrained(head_folder)
    facts_path.write_text(json.dumps(facts, indent=2) + "\n")

    count = 1000
    as_saved = TwistTrainer(base_folder, trainer.potential, config, head=TwistHead.from_pretrained(head_folder))
    fresh = TwistTrainer(base_folder, trainer.potential, config)
    start = [evaluate(fresh, prompt, count, args.seed + 1, ("q",))["loss"] for prompt in PROMPTS]
    figures = {
        prompt: evaluate(as_saved, prompt, count, args.seed + 1) for prompt in tqdm(PROMPTS + UNSEEN_PROMPTS, "figures")
    }
    facts |= {
        "products": len(PRODUCTS) + len(PLURALS),
        "vocab": len(trainer.tokenizer),
        "parameters": trainer.model.num_parameters() / 1e6,
        "sharpness": SHARPNESS,
        "head_type": HEAD_TYPE,
        "twist_steps": args.twist_steps,
        "twist_batch": TWIST_BATCH,
        "max_tokens": MAX_TOKENS,
        "learning_rate": LEARNING_RATE,
        "threads": args.threads,
        "ctl_start": mean(start),
        "ctl_end": mean(figures[prompt]["loss"] for prompt in PROMPTS),
        "count": count,
        **{
            f"{key}_{name}": mean(f[name][key] for f in figures.values())
            for key in ("positive", "length")
            for name in ("p0", "q")
        },
    }
    args.report.write_text(report(figures, facts))
    print({key: round(value, 5) if isinstance(value, float) else value for key, value in facts.items()})


if __name__ == "__main__":
    main()
