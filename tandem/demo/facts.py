"""Tables of plain facts the demo corpus draws its questions from. Data only."""

from __future__ import annotations

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Iceland": "Reykjavik", "Poland": "Warsaw", "Austria": "Vienna",
    "Hungary": "Budapest", "Greece": "Athens", "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv",
    "Belgium": "Brussels", "Croatia": "Zagreb", "Serbia": "Belgrade", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Indonesia": "Jakarta", "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Morocco": "Rabat",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia", "Peru": "Lima",
    "Chile": "Santiago", "Argentina": "Buenos Aires", "Colombia": "Bogota", "Australia": "Canberra",
    "New Zealand": "Wellington", "South Korea": "Seoul", "the Netherlands": "Amsterdam", "the Czech Republic": "Prague",
    "the United States": "Washington, D.C.",
}

ELEMENTS: dict[str, str] = {
    "hydrogen": "H", "helium": "He", "lithium": "Li", "carbon": "C", "nitrogen": "N", "oxygen": "O", "fluorine": "F",
    "neon": "Ne", "sodium": "Na", "magnesium": "Mg", "aluminium": "Al", "silicon": "Si", "sulfur": "S",
    "chlorine": "Cl", "potassium": "K", "calcium": "Ca", "iron": "Fe", "nickel": "Ni", "copper": "Cu", "zinc": "Zn",
    "silver": "Ag", "tin": "Sn", "gold": "Au", "mercury": "Hg", "lead": "Pb", "uranium": "U",
}

SOUNDS: dict[str, str] = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink", "horse": "neigh",
    "lion": "roar", "owl": "hoot", "bee": "buzz", "frog": "croak", "snake": "hiss", "mouse": "squeak", "wolf": "howl",
}

YOUNG: dict[str, str] = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "duck": "duckling", "pig": "piglet",
    "horse": "foal", "lion": "cub", "goat": "kid", "frog": "tadpole", "goose": "gosling", "deer": "fawn",
    "swan": "cygnet", "kangaroo": "joey",
}

LEGS: dict[str, str] = {
    "dog": "four", "cat": "four", "cow": "four", "horse": "four", "spider": "eight", "ant": "six", "bee": "six",
    "beetle": "six", "bird": "two", "duck": "two", "chicken": "two", "snake": "no", "fish": "no", "frog": "four",
    "octopus": "no",
}

COLOURS: dict[str, str] = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "a lemon": "yellow", "coal": "black",
    "a carrot": "orange", "a tomato": "red", "blood": "red", "a strawberry": "red", "a leaf": "green", "milk": "white",
    "the sun": "yellow", "a flamingo": "pink", "chocolate": "brown", "an elephant": "grey", "the sea": "blue",
    "a frog": "green", "a raven": "black", "a pumpkin": "orange",
}

OPPOSITES: dict[str, str] = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "left": "right", "open": "closed", "light": "dark",
    "happy": "sad", "early": "late", "rich": "poor", "hard": "soft", "wet": "dry", "full": "empty", "loud": "quiet",
    "old": "young", "strong": "weak", "day": "night", "inside": "outside", "long": "short", "high": "low",
}

LANGUAGES: dict[str, str] = {
    "France": "French", "Germany": "German", "Italy": "Italian", "Spain": "Spanish", "Portugal": "Portuguese",
    "England": "English", "Japan": "Japanese", "China": "Chinese", "Russia": "Russian", "Poland": "Polish",
    "Greece": "Greek", "Turkey": "Turkish", "Norway": "Norwegian", "Sweden": "Swedish", "Denmark": "Danish",
    "Brazil": "Portuguese", "Mexico": "Spanish", "Australia": "English", "Hungary": "Hungarian",
    "Finland": "Finnish",
}

MISC: tuple[tuple[str, str, str], ...] = (
    ("How many days are in a week?", "How many days does a week have?", "There are seven days in a week."),
    ("How many months are in a year?", "How many months does a year have?", "There are twelve months in a year."),
    ("How many hours are in a day?", "How many hours does a day have?", "There are 24 hours in a day."),
    ("How many minutes are in an hour?", "How many minutes does an hour have?", "There are 60 minutes in an hour."),
    ("How many seconds are in a minute?", "How many seconds does a minute have?", "There are 60 seconds in a minute."),
    ("How many days are in a year?", "How many days does a year have?", "There are 365 days in a year."),
    ("What is the largest planet?", "Which planet is the largest?", "Jupiter is the largest planet."),
    ("What is the smallest planet?", "Which planet is the smallest?", "Mercury is the smallest planet."),
    ("What is the largest ocean?", "Which ocean is the largest?", "The Pacific is the largest ocean."),
    ("What is the highest mountain?", "Which mountain is the highest?", "Mount Everest is the highest mountain."),
    ("What is the largest animal?", "Which animal is the largest?", "The blue whale is the largest animal."),
    ("What is the fastest land animal?", "Which land animal is the fastest?",
     "The cheetah is the fastest land animal."),
    ("Who wrote Hamlet?", "Who is the author of Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Who painted the Mona Lisa?", "Who is the painter of the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("What is water made of?", "What does water consist of?", "Water is made of hydrogen and oxygen."),
    ("At what temperature does water boil?", "What is the boiling point of water?",
     "Water boils at 100 degrees Celsius."),
    ("At what temperature does water freeze?", "What is the freezing point of water?",
     "Water freezes at 0 degrees Celsius."),
    ("What do bees make?", "What is made by bees?", "Bees make honey."),
    ("What star is closest to the Earth?", "Which star is nearest to the Earth?",
     "The Sun is the star closest to the Earth."),
    ("How many continents are there?", "What is the number of continents?", "There are seven continents."),
)

WEEKDAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)
PLANETS: tuple[str, ...] = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
SEASONS: tuple[str, ...] = ("spring", "summer", "autumn", "winter")
RAINBOW: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "indigo", "violet")
ALPHABET: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

NAMES: tuple[str, ...] = (
    "Ada", "Alan", "Alice", "Amir", "Anna", "Ben", "Bob", "Bruno", "Carla", "Carlos", "Chen", "Chloe", "Clara",
    "Daniel", "David", "Diana", "Dora", "Edgar", "Ella", "Emil", "Emma", "Eric", "Eva", "Fatima", "Felix", "Fiona",
    "Frank", "Georg", "Grace", "Hana", "Hans", "Helen", "Hugo", "Ida", "Igor", "Ines", "Iris", "Ivan", "Jack", "Jane",
    "Javier", "John", "Julia", "Karl", "Kate", "Kenji", "Laura", "Leo", "Lena", "Linus", "Lisa", "Lucas", "Lucy",
    "Maria", "Mark", "Marta", "Max", "Mei", "Mia", "Mike", "Mila", "Nadia", "Nina", "Noah", "Nora", "Olga", "Oliver",
    "Omar", "Oscar", "Paul", "Peter", "Petra", "Priya", "Rosa", "Ravi", "Robert", "Ruth", "Sam", "Sara", "Simon",
    "Sofia", "Stefan", "Tara", "Theo", "Thomas", "Tim", "Tom", "Vera", "Victor", "Wang", "Wendy", "Yara", "Yuki",
    "Zoe", "Grete", "Ahmed", "Bella", "Casper", "Delia", "Elias",
)
CITIES: tuple[str, ...] = (
    "Paris", "Berlin", "Rome", "Madrid", "Lisbon", "London", "Dublin", "Oslo", "Vienna", "Athens", "Moscow", "Tokyo",
    "Beijing", "Cairo", "Nairobi", "Lima", "Hamburg", "Milan", "Porto", "Boston", "Chicago", "Sydney", "Zurich",
    "Geneva", "Munich", "Lyon", "Osaka", "Toronto",
)
HOBBIES: tuple[str, ...] = (
    "chess", "tennis", "reading", "cooking", "hiking", "music", "painting", "running", "swimming", "football",
    "cycling", "dancing", "gardening", "fishing", "sailing", "skiing", "singing", "knitting",
)
JOBS: tuple[str, ...] = (
    "teacher", "doctor", "baker", "farmer", "nurse", "pilot", "painter", "lawyer", "driver", "cook", "writer",
    "singer", "carpenter", "gardener", "programmer", "judge",
)
FRUIT: tuple[str, ...] = (
    "apple", "pear", "cherry", "plum", "lemon", "banana", "mango", "peach", "grape", "melon", "fig", "lime",
)
WORDS: tuple[str, ...] = (
    "river", "stone", "window", "garden", "music", "paper", "silver", "bridge", "forest", "candle", "mirror",
    "basket", "cloud", "engine", "feather", "hammer", "island", "jacket", "kettle", "ladder", "market", "needle",
    "ocean", "pencil", "rocket", "saddle", "table", "valley", "wagon", "yellow", "zebra", "anchor", "bottle",
    "castle", "dragon", "ember", "falcon", "glacier", "harbor", "ivory", "jungle", "kitchen", "lantern", "meadow",
    "north", "orange", "pepper", "quiet", "ribbon", "summer", "thunder", "umbrella", "velvet", "winter",
    "blue", "green", "seven", "quick", "brown", "fox", "moon", "star", "light", "door", "house", "tree", "bird",
    "fish", "horse", "road", "the", "a", "and", "of", "over", "under", "small", "big", "old", "new",
)
