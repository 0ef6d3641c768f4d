"""Tenants, models and adapters never share, whatever their tokens."""

import pytest

from prefixtree import InvalidNamespace, PrefixCache

TENANTS = ["", "b", ("llama", 3, None), ("llama", "3", None)]


def committed(cache: PrefixCache, tokens: list[int], namespace: object) -> None:
    with cache.open(tokens, namespace=namespace) as sequence:
        sequence.commit(len(tokens))


@pytest.mark.parametrize("owner", TENANTS, ids=repr)
def test_only_the_owner_matches(owner: object) -> None:
    cache = PrefixCache(16, 4)
    committed(cache, [1, 2, 3, 4, 5], owner)
    found = {tenant: cache.match([1, 2, 3, 4, 5], namespace=tenant).cached for tenant in TENANTS}
    assert found == {tenant: 5 if tenant == owner else 0 for tenant in TENANTS}
    cache.check()


def test_a_prompt_being_computed_is_pending_in_its_own_namespace_only() -> None:
    cache = PrefixCache(16, 4)
    cache.open([1, 2, 3], namespace="a")
    cache.open([1, 2], namespace="")
    assert cache.match([1, 2, 3], namespace="a").pending == 3
    assert cache.match([1, 2, 3]).pending == 2
    assert cache.match([1, 2, 3], namespace="c").pending == 0


def test_the_same_tokens_hold_slots_of_their_own_in_each_namespace() -> None:
    cache = PrefixCache(16, 4)
    sequences = [cache.open([1, 2, 3], namespace=tenant) for tenant in TENANTS]
    cache.commit(sequences)
    slots = [slot for sequence in sequences for slot in sequence.slots(0, 3).tolist()]
    assert len(set(slots)) == 3 * len(TENANTS)
    assert len(cache.forest(sequences).parent) == len(TENANTS)


def test_forks_and_resumed_sequences_stay_in_their_namespace() -> None:
    cache = PrefixCache(16, 4)
    sequence = cache.open([1, 2, 3], namespace="a")
    sequence.commit(3)
    (fork,) = sequence.fork(1)
    fork.preempt()
    committed(cache, [1, 2, 3], "b")
    fork.resume()
    assert fork.cached_len == 3
    assert fork.slots(0, 3).tolist() == sequence.slots(0, 3).tolist()
    cache.append([fork], [9])
    cache.commit([fork])
    assert cache.match([1, 2, 3, 9], namespace="a").cached == 4
    assert cache.match([1, 2, 3, 9], namespace="b").cached == 3


def test_thousands_of_tenants_that_have_gone_leave_nothing() -> None:
    cache = PrefixCache(8, 4)
    for tenant in range(2000):
        committed(cache, [1, 2, 3], ("tenant", tenant))
    assert cache.stats().nodes <= 8
    cache.clear()
    assert cache.stats().nodes == 0
    assert len(cache.tree().roots) == 1
    assert cache.stats().free_blocks == 8
    cache.check()


def test_the_tree_shows_namespaces_apart() -> None:
    cache = PrefixCache(8, 4)
    committed(cache, [1, 2], "")
    committed(cache, [1, 2], "other")
    assert {name: len(root.children) for name, root in cache.tree().roots.items()} == {
        "": 1,
        "other": 1,
    }
    assert "namespace 'other'" in str(cache.tree())


@pytest.mark.parametrize(
    "wrong", [None, 1, 1.5, ["a"], b"a", ("a", 1.5), ("a", True), {"a": 1}], ids=repr
)
def test_a_namespace_of_the_wrong_type_is_refused(wrong: object) -> None:
    cache = PrefixCache(8, 4)
    for call in (cache.open, cache.match, cache.can_open, cache.pin, cache.forget):
        with pytest.raises(InvalidNamespace, match="str or a tuple"):
            call([1, 2], namespace=wrong)
    assert cache.stats().opens == 0
    assert cache.stats().nodes == 0
