"""Thirty everyday tools with hand-written requests.

One block a tool: ``name | description | parameters``, then request templates. A parameter is
``name:kind`` or ``name:choice|choice``; a question mark makes it optional. ``[...]`` is said only when
the optional parameter inside it is given; ``[!flag: words]`` sets a boolean. The last template of every
tool is held out of training: a new combination of words that its other templates use.
"""

from __future__ import annotations

import functools

from mlxkd.demo.tools import DemoTool, parse_catalog

CATALOG = """
create_reminder | Create a reminder | text:task time:time date?:day
  remind me to {text} at {time} [on {date}]
  set a reminder at {time} to {text} [for {date}]
  I need a reminder to {text} at {time} [{date}]
  don't let me forget to {text} [{date}] at {time}
  could you remind me at {time} that I have to {text} [on {date}]
  please ping me at {time} to {text} [on {date}]
  remind me [on {date}] at {time} that I must {text}
  create a reminder for {time} [on {date}]: {text}
  please set a reminder to {text} at {time} [for {date}]
get_weather | Get the weather of a city | city:place unit?:celsius|fahrenheit date?:day
  what is the weather in {city} [in {unit}] [on {date}]
  how is the weather in {city} [{date}] [in {unit}]
  weather for {city} please [in {unit}]
  will it rain in {city} [{date}]
  tell me the forecast of {city} [for {date}] [in {unit}]
  is it warm in {city} [on {date}] [in {unit}]
  show me the weather of {city} [in {unit}] [for {date}]
  I need the forecast for {city} [on {date}] [in {unit}]
  tell me the weather in {city} [for {date}] [in {unit}]
send_message | Send a text message | recipient:person message:task urgent?:truth
  tell {recipient} to {message} [!urgent: urgently]
  send {recipient} a message: {message} [!urgent: and mark it urgent]
  message {recipient} that they should {message} [!urgent: it is urgent]
  write to {recipient}: {message} [!urgent: urgent]
  let {recipient} know they have to {message} [!urgent: this is urgent]
  text {recipient} to {message} [!urgent: with urgency]
  send the message {message} to {recipient} [!urgent: as urgent]
  please tell {recipient} that they have to {message} [!urgent: it is urgent]
  send a message to {recipient}: {message} [!urgent: urgently]
send_email | Send an email | to:person subject:topic cc?:people
  email {to} about {subject} [with {cc} in copy]
  send an email to {to} with the subject {subject} [and copy {cc}]
  write an email to {to} on {subject} [cc {cc}]
  mail {to} regarding {subject} [copying {cc}]
  drop {to} an email about {subject} [with {cc} in cc]
  send {to} an email on {subject} [and put {cc} in copy]
  write to {to} by email about {subject} [copying {cc}]
  write an email to {to} about {subject} [and copy {cc}]
book_table | Book a restaurant table | restaurant:place guests:small time?:time outdoor?:truth
  book a table at {restaurant} for {guests} people [at {time}] [!outdoor: outdoors]
  reserve a table for {guests} at {restaurant} [at {time}] [!outdoor: outside]
  I want to eat at {restaurant} with {guests} guests [at {time}] [!outdoor: outdoors]
  get us a table for {guests} in {restaurant} [around {time}] [!outdoor: outside]
  we are {guests} and want dinner at {restaurant} [at {time}] [!outdoor: outdoors]
  please book us a table at {restaurant} [at {time}] for {guests} [!outdoor: outdoors]
  reserve a table in {restaurant} for {guests} people [around {time}] [!outdoor: outside]
  book a table for {guests} people at {restaurant} [at {time}] [!outdoor: outside]
book_flight | Book a flight | origin:place destination:place date:day seat?:window|aisle
  book a flight from {origin} to {destination} on {date} [with a {seat} seat]
  fly me from {origin} to {destination} {date} [{seat} seat please]
  I need a plane from {origin} to {destination} on {date} [at the {seat}]
  get me to {destination} from {origin} on {date} by plane [{seat} seat]
  find a flight leaving {origin} for {destination} {date} [{seat} seat]
  show me flights from {origin} to {destination} {date} [with a {seat} seat]
  find a plane to {destination} from {origin} on {date} [at the {seat}]
  find a flight from {origin} to {destination} on {date} [with a {seat} seat]
search_trains | Search train connections | origin:place destination:place date?:day
  when do trains go from {origin} to {destination} [on {date}]
  find a train from {origin} to {destination} [for {date}]
  show me trains between {origin} and {destination} [{date}]
  I want to take the train from {origin} to {destination} [on {date}]
  which trains leave {origin} for {destination} [on {date}]
  look for trains from {origin} to {destination} [on {date}]
  show me the train connections between {origin} and {destination} [for {date}]
  show me trains from {origin} to {destination} [on {date}]
play_music | Play music | title:topic volume?:integer shuffle?:truth
  play {title} [at volume {volume}] [!shuffle: on shuffle]
  put on {title} [with volume {volume}] [!shuffle: shuffled]
  I want to hear {title} [at volume {volume}] [!shuffle: in random order]
  start the music {title} [volume {volume}] [!shuffle: and shuffle]
  let me listen to {title} [at volume {volume}] [!shuffle: shuffled]
  I want {title} to play [at volume {volume}] [!shuffle: on shuffle]
  listen to {title} [with volume {volume}] [!shuffle: in random order]
  I want to listen to {title} [at volume {volume}] [!shuffle: shuffled]
set_timer | Set a timer | minutes:integer label?:topic
  set a timer for {minutes} minutes [called {label}]
  start a {minutes} minute timer [named {label}]
  time {minutes} minutes for me [for {label}]
  count down {minutes} minutes [and call it {label}]
  give me a timer of {minutes} minutes [labelled {label}]
  make a timer [called {label}] of {minutes} minutes
  set the timer to {minutes} minutes [for {label}]
  give me a {minutes} minute timer [called {label}]
set_alarm | Set an alarm | time:time repeat?:daily|weekly|never
  wake me up at {time} [{repeat}]
  set an alarm for {time} [repeating {repeat}]
  alarm at {time} please [{repeat}]
  I have to get up at {time} [{repeat}]
  ring me at {time} [{repeat}]
  make an alarm for {time} [{repeat}]
  set the alarm to {time} [and repeat it {repeat}]
  set an alarm at {time} [{repeat}]
add_to_list | Add items to a list | list:topic items:things
  add {items} to the {list} list
  put {items} on my {list} list
  the {list} list needs {items}
  please add {items} to {list}
  write {items} on the list {list}
  please write {items} on my {list} list
  I need {items} on the list {list}
  please put {items} on the {list} list
order_food | Order food | dishes:things address?:place
  order {dishes} [to {address}]
  I would like to order {dishes} [delivered to {address}]
  get me {dishes} [and bring it to {address}]
  we are hungry, order {dishes} [to {address}]
  can I have {dishes} delivered [to {address}]
  order some food: {dishes} [for {address}]
  please get {dishes} [delivered to {address}]
  get me {dishes} [delivered to {address}]
convert_currency | Convert an amount of money | amount:decimal source:dollars|euros|yen|pounds target:dollars|euros|yen|pounds
  convert {amount} {source} to {target}
  how much is {amount} {source} in {target}
  what are {amount} {source} worth in {target}
  change {amount} {source} into {target}
  give me {amount} {source} as {target}
  what is {amount} {source} in {target}
  how many {target} are {amount} {source}
  how much are {amount} {source} in {target}
translate_text | Translate a text | text:task language:language formal?:truth
  translate {text} into {language} [!formal: formally]
  how do you say {text} in {language} [!formal: in a formal way]
  what is {text} in {language} [!formal: formally]
  say {text} in {language} [!formal: in formal words]
  put {text} into {language} [!formal: formally]
  translate to {language}: {text} [!formal: formally]
  please translate {text} [!formal: formally] to {language}
  translate {text} to {language} [!formal: in a formal way]
create_event | Create a calendar event | title:topic date:day time:time guests?:people
  create an event {title} on {date} at {time} [with {guests}]
  put {title} in my calendar for {date} at {time} [and invite {guests}]
  schedule {title} {date} at {time} [with {guests}]
  I have {title} on {date} at {time} [with {guests}]
  plan {title} for {date} {time} [inviting {guests}]
  add {title} to my calendar at {time} on {date} [with {guests}]
  put the event {title} in the calendar on {date} at {time} [and invite {guests}]
  put {title} in my calendar on {date} at {time} [with {guests}]
create_note | Write a note | title:topic text:task pinned?:truth
  make a note titled {title} saying {text} [!pinned: and pin it]
  note down {text} under {title} [!pinned: pinned]
  write a note called {title}: {text} [!pinned: pin it]
  take a note {title} with the text {text} [!pinned: and pin it]
  new note {title} that says {text} [!pinned: pinned please]
  write down {text} in a note titled {title} [!pinned: and pin it]
  create a note {title} saying {text} [!pinned: and pin it]
  write a note titled {title} saying {text} [!pinned: and pin it]
turn_on_light | Switch on a light | room:kitchen|bedroom|bathroom|office|hall color?:color brightness?:integer
  turn on the light in the {room} [in {color}] [at {brightness} percent]
  switch on the {room} light [to {color}] [with brightness {brightness}]
  make the {room} bright [in {color}] [at {brightness} percent]
  lights on in the {room} [{color}] [at brightness {brightness}]
  I need light in the {room} [in {color}] [at {brightness} percent]
  switch the light on in the {room} [at {brightness} percent] [in {color}]
  light in the {room} please [with brightness {brightness}] [in {color}]
  switch on the light in the {room} [in {color}] [with brightness {brightness}]
set_temperature | Set the room temperature | degrees:decimal room?:kitchen|bedroom|bathroom|office|hall
  set the temperature to {degrees} degrees [in the {room}]
  make it {degrees} degrees [in the {room}]
  heat the house to {degrees} [only the {room}]
  I want {degrees} degrees [in the {room}]
  put the heating at {degrees} [in the {room}]
  set it to {degrees} degrees [in the {room}]
  change the temperature [in the {room}] to {degrees} degrees
  set the heating to {degrees} degrees [in the {room}]
call_contact | Call somebody | contact:person video?:truth
  call {contact} [!video: with video]
  ring {contact} up [!video: by video]
  start a call with {contact} [!video: on video]
  I want to talk to {contact} [!video: by video]
  get {contact} on the phone [!video: with video]
  I need to call {contact} [!video: on video]
  please start a [!video: video] call and get {contact}
  start a call to {contact} [!video: by video]
find_recipe | Find a recipe | ingredients:things diet?:vegan|vegetarian|any
  find a recipe with {ingredients} [that is {diet}]
  what can I cook with {ingredients} [{diet}]
  I have {ingredients}, what can I make [{diet} please]
  show me {diet} recipes with {ingredients}
  suggest a dish from {ingredients} [that is {diet}]
  find me a [{diet}] recipe from {ingredients}
  which recipes are there with {ingredients} [that are {diet}]
  find recipes with {ingredients} [that is {diet}]
get_stock_price | Get a stock price | symbol:code currency?:dollars|euros|yen|pounds
  what is the price of {symbol} [in {currency}]
  how does the stock {symbol} stand [in {currency}]
  stock price of {symbol} [in {currency}]
  what does a share of {symbol} cost [in {currency}]
  quote me the share {symbol} [in {currency}]
  show me the price of the stock {symbol} [in {currency}]
  what is {symbol} worth [in {currency}]
  what is the stock price of {symbol} [in {currency}]
track_parcel | Track a parcel | number:code
  where is my parcel {number}
  track the parcel {number}
  has the package {number} arrived
  what is the state of shipment {number}
  when does delivery {number} come
  show me where the parcel {number} is
  is the package {number} there
  where is the package {number}
pay_bill | Pay a bill | payee:person amount:decimal reference?:code
  pay {payee} {amount} [with reference {reference}]
  transfer {amount} to {payee} [reference {reference}]
  send {payee} the sum of {amount} [for {reference}]
  I owe {payee} {amount}, please pay [reference {reference}]
  settle {amount} with {payee} [with the reference {reference}]
  pay the bill of {amount} to {payee} [reference {reference}]
  please pay {payee} the amount of {amount} [with reference {reference}]
  pay {amount} to {payee} [with the reference {reference}]
rent_car | Rent a car | city:place days:small size?:small|medium|large
  rent a [{size}] car in {city} for {days} days
  I need a [{size}] car in {city} for {days} days
  get me a [{size}] rental car in {city} {days} days long
  book a [{size}] car for {days} days in {city}
  hire a [{size}] car for {days} days at {city}
  find me a [{size}] car for {days} days in {city}
  for {days} days I want a [{size}] car in {city}
  get me a [{size}] car in {city} for {days} days
book_hotel | Book a hotel | city:place nights:small guests?:small breakfast?:truth
  book a hotel in {city} for {nights} nights [for {guests} people] [!breakfast: with breakfast]
  I need a room in {city} for {nights} nights [{guests} guests] [!breakfast: breakfast included]
  find a hotel in {city}, {nights} nights [for {guests} guests] [!breakfast: with breakfast]
  stay {nights} nights in {city} [with {guests} people] [!breakfast: including breakfast]
  we sleep {nights} nights in {city} [we are {guests}] [!breakfast: with breakfast]
  book a room [for {guests} people] in {city} for {nights} nights [!breakfast: with breakfast]
  find me a place for {nights} nights in {city} [with {guests} guests] [!breakfast: and breakfast]
  find a room in {city} for {nights} nights [with {guests} people] [!breakfast: with breakfast]
get_directions | Get directions | origin:place destination:place mode?:car|bike|walk|bus
  how do I get from {origin} to {destination} [by {mode}]
  directions from {origin} to {destination} [by {mode}]
  show me the way from {origin} to {destination} [with the {mode}]
  route from {origin} to {destination} [by {mode}]
  guide me from {origin} to {destination} [by {mode}]
  show me how to get [by {mode}] to {destination} from {origin}
  what is the route between {origin} and {destination} [by {mode}]
  I need the route to {destination} from {origin} [by {mode}]
  show me the route from {origin} to {destination} [by {mode}]
log_workout | Log a workout | activity:running|swimming|cycling|yoga|rowing minutes:integer distance?:decimal
  I did {minutes} minutes of {activity} [over {distance} km]
  log {activity} for {minutes} minutes [and {distance} km]
  add a workout: {activity}, {minutes} minutes [{distance} km]
  I was {activity} for {minutes} minutes [{distance} km]
  note {minutes} minutes of {activity} [with {distance} km]
  log a workout of {minutes} minutes of {activity} [over {distance} km]
  write down {minutes} minutes {activity} [and {distance} km]
  log [{distance} km of] {activity} in {minutes} minutes
  log {minutes} minutes of {activity} [and {distance} km]
set_volume | Set the volume | level:integer device?:speaker|phone|television
  set the volume to {level} [on the {device}]
  volume {level} please [for the {device}]
  turn the sound to {level} [of the {device}]
  make it as loud as {level} [on the {device}]
  change the loudness to {level} [on the {device}]
  put the sound at {level} [on the {device}]
  set the loudness [of the {device}] to {level}
  set the sound to {level} [on the {device}]
open_ticket | Open a support ticket | title:topic priority:low|normal|high assignee?:person
  open a {priority} priority ticket about {title} [for {assignee}]
  file a ticket {title} with {priority} priority [assigned to {assignee}]
  report a problem with {title}, priority {priority} [and give it to {assignee}]
  create a support ticket {title}, it is {priority} priority [for {assignee}]
  raise a ticket on {title} with priority {priority} [for {assignee}]
  create a ticket on {title} [for {assignee}] with {priority} priority
  open a {priority} ticket called {title} [assigned to {assignee}]
  open a ticket about {title} with {priority} priority [assigned to {assignee}]
find_movies | Find movies | genre:comedy|drama|horror|action|romance year?:integer actor?:person
  find {genre} movies [from {year}] [with {actor}]
  which {genre} films are there [of {year}] [with {actor}]
  I want to watch a {genre} movie [from {year}] [starring {actor}]
  show me {genre} movies [made in {year}] [with {actor}]
  suggest a {genre} film [from the year {year}] [with {actor}]
  find me a {genre} film [with {actor}] [from {year}]
  are there {genre} movies [starring {actor}] [of the year {year}]
  show me {genre} films [from {year}] [with {actor}]
"""


@functools.cache
def everyday_tools() -> tuple[DemoTool, ...]:
    """The hand-written tools, in a fixed order."""
    return parse_catalog(CATALOG)
