"""A server for each teacher that a test needs, closed at its end."""

import pytest
from distill_support import TeacherServer


@pytest.fixture
def server():
    made = []

    def start(reply):
        made.append(TeacherServer(reply))
        return made[-1]

    yield start
    for one in made:
        one.close()
