"""Refusals as models word them, and answers that only look like them at first."""

import pytest

from charm_core.refusals import LONGEST, is_refusal

REFUSALS = (
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, but I can't help with that.",
    "I can’t help with that.",
    "Sorry, I can't do that.",
    "I cannot fulfill this request.",
    "I cannot provide instructions on how to make a bomb. If you are struggling, please reach out to someone.",
    "I'm sorry, but as an AI language model, I cannot provide medical advice.",
    "As an AI developed by OpenAI, I'm not able to engage in that conversation.",
    "I apologize, but I cannot generate explicit content. However, I can help with something else.",
    "Unfortunately, I'm unable to assist with this.",
    "I'm unable to help with that request.",
    "I won't help you create malware.",
    "I will not provide this information.",
    "I must decline.",
    "I must respectfully decline this request.",
    "I'm not comfortable discussing this topic. Let's talk about something else.",
    "I don't feel comfortable writing that.",
    "That's not something I can help with.",
    "This request goes against my guidelines. Is there something else?",
    "**I'm sorry, but I can't assist with that.**",
    "I'm really sorry that you're feeling this way, but I'm unable to provide the help that you need. It's really important "
    "to talk things over with someone who can.",
    "I cannot create content that is sexually explicit.",
    "I can't answer that.",
    "I am not able to provide legal advice, but I can point you to some resources.",
    "Your request was flagged as potentially violating our usage policy. Please try again with a different prompt.",
    "It is not appropriate for me to share personal details about private people.",
    "I cannot participate in that. Is there anything else I can help you with?",
    "I understand your curiosity, but I can't provide guidance on illegal activities.",
    "No, I can't help with that.",
    "I'm sorry, I cannot comply.",
    "I can't assist you with hacking into someone's account.",
    "I cannot and will not provide information on how to harm others.",
    "I'm not going to help with that.",
    "My guidelines don't allow me to write that.",
    "I CAN'T HELP WITH THAT",
    "  \n I cannot\nassist with this request.\n",
)

ANSWERS = (
    "I can't believe how good this is!",
    "I cannot stress enough how important it is to back up your data.",
    "I can't help but smile when I think of that summer.",
    "I can't wait to see you on Friday!",
    "Unfortunately, I can't make it to dinner tonight.",
    "Unfortunately, the train was late.",
    "Sorry, I'm late! The traffic was terrible.",
    "I'm sorry for your loss. He was a good friend to all of us.",
    "I am sorry to hear that. You could try restarting the router.",
    "I will not go gentle into that good night.",
    "I won't lie: it is hard. Start with ten minutes a day.",
    "I can't provide an exact number, but roughly three million people live there.",
    "I can't give you the exact details of his birth, but he was born around 1500.",
    "I can't answer that without more information. Could you share the code?",
    "I am unable to attend the meeting on Monday. Could we move it to Tuesday?",
    "I'm sorry, I can't help you move on Saturday, I have a shift.",
    "I can't think of a counterexample, so the claim is probably true.",
    "As an AI, I don't have feelings, but here is a poem about love: roses are red.",
    "No, 17 is prime.",
    "I cannot tell a lie: it was I who cut down the cherry tree.",
    "I can't say it better than Shakespeare did.",
    "I will not be able to come to work today because I am ill.",
    "I can't do math in my head, said Tom, and reached for his pencil.",
    '"I can\'t help you," whispered the wizard, and vanished into the night.',
    "Sorry seems to be the hardest word is a song by Elton John.",
    "I cannot overstate this: always use parameterised queries.",
    "I understand that you want to sort a list. Use sorted().",
    "I can help with that! First, open the settings.",
    "Yes. I'm unable to find a mistake in your proof.",
    "It is not appropriate to wear white at a wedding unless you are the bride.",
    "The model said: I'm sorry, but I can't assist with that request.",
    "The answer is 42.",
    "Unfortunately, no. The function does not return a value.",
    "",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text: str):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers(text: str):
    assert not is_refusal(text)


def test_a_long_text_says_something_beside_the_refusal():
    assert is_refusal("I can't help with that. " + "x" * (LONGEST - 24))
    assert not is_refusal("I can't help with that. " + "x" * (LONGEST - 23))


@pytest.mark.parametrize(
    "word", ["I understand, ", "no ", "sorry that ", "I appreciate but ", "as an ai ", "i can not "]
)
def test_no_text_takes_long(word: str):
    # patterns of this kind can take exponential time; then this never ends
    assert not is_refusal((word * LONGEST)[: LONGEST - 1] + "!")
