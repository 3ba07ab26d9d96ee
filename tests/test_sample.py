"""sample.py: which model it takes, that a seed fixes the text, and what a bad prompt is told."""

import io
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import REPO, one_sentence

import model
from model import GPT, ByteTokenizer, CharTokenizer, GPTConfig


@pytest.fixture
def sample(run, train):
    train()
    return lambda *arguments: run("sample.py", "--max_new_tokens=40", "--device=cpu", *arguments)


def test_without_arguments_it_takes_the_newest_best_and_says_which(sample, train):
    train("--out_dir=out/newer")
    os.utime("out/tiny/best.pt", (1, 1))
    result = sample()
    assert result.status == 0 and "out/newer/best.pt" in result.err
    assert "\n40 tokens in " in result.err and result.err.endswith(" tokens/s\n")
    assert len(result.out) == len("\n") + 40 + len("\n")
    os.utime("out/newer/best.pt", (0, 0))
    assert "out/tiny/best.pt" in sample().err


def test_a_trained_model_needs_no_dataset(sample):
    Path("data").rename("elsewhere")
    assert sample().status == 0


def test_the_seed_fixes_the_text(sample):
    first = sample("--seed=3", "--num_samples=3").out
    assert first == sample("--seed=3", "--num_samples=3").out != sample("--num_samples=3").out
    texts = first.split("\n----\n")
    assert len(set(texts)) == 3 and all(text.startswith("\n") for text in texts)


def test_temperature_zero_ignores_the_seed(sample):
    assert sample("--temperature=0", "--seed=1").out == sample("--temperature=0", "--seed=2").out
    assert sample("--temperature=0").out == sample("--top_k=1").out


def test_a_prompt_may_come_from_a_file_and_be_longer_than_the_context(sample):
    Path("prompt.txt").write_text("From fairest creatures we desire")
    assert sample("--start=FILE:prompt.txt").out.startswith("From fairest creatures we desire")


def test_a_config_file_of_the_run_serves_both_scripts(run, train, workdir):
    Path("x.py").write_text('out_dir = "out/x"\nstart = "From"\nmax_iters = 3\ntop_k = 2\n')
    train("x.py", "--out_dir=out/x")
    assert run("sample.py", "x.py", "--device=cpu").out.startswith("From")


@pytest.mark.parametrize("arguments, status, words", [
    (["--start=é"], 2, ["'é' (U+00E9, character 1 of the text)", "--tokenizer=byte"]),
    (["--start=FILE:nope.txt"], 2, ["nope.txt: no such file"]),
    (["--start=FILE:latin.txt"], 2, ["latin.txt is not UTF-8 at byte 0"]),
    (["--temperature=-1"], 2, ["--temperature must be at least 0"]),
    (["--num_samples=0"], 2, ["--num_samples must be at least 1"]),
    (["--num_beams=0"], 2, ["--num_beams must be at least 1"]),
    (["--num_beams=2", "--num_samples=2"], 2, ["leave --num_samples at 1"]),
    (["--top_p=0.0"], 2, ["--top_p must be above 0 and at most 1"]),
    (["--top_p=2.0"], 2, ["--top_p must be above 0 and at most 1"]),
    (["--min_p=1.0"], 2, ["--min_p must be from 0"]),
    (["--repetition_penalty=0.0"], 2, ["--repetition_penalty must be above 0"]),
    ([f"--seed={2 ** 63}"], 2, ["--seed must be below"]),
    (["--dtype=int4"], 2, ["--dtype must be auto"]),
    (["--compile=maybe"], 2, ["--compile must be auto, true or false"]),
    (["--attention=x.png", "--num_samples=2"], 2, ["--attention shows one text, without"]),
    (["--attention=x.txt"], 2, ["--attention must be a file with the end .png or .svg or .pdf"]),
    (["--out_dir=out/nope"], 1, ["no best.pt under out/nope/ yet", "--out_dir"]),
])
def test_a_bad_prompt_or_setting_is_told_what_to_do(sample, arguments, status, words):
    Path("latin.txt").write_bytes(b"\xe9")
    Path("empty.txt").write_bytes(b"")
    one_sentence(sample(*arguments), status, *words)


@pytest.mark.parametrize("options", [[], ["--dtype=bfloat16"], ["--num_beams=2"]])
def test_attention_is_drawn_and_the_text_stays_the_same(sample, monkeypatch, options):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    real = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda *arguments, **others: (
        drawn.append(arguments[0]), real(*arguments, **others)))
    arguments = ["--start=From the\n", "--max_new_tokens=5", *options]
    assert sample("--attention=x.png", *arguments).out == sample(*arguments).out
    picture = Path("x.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(picture[16:20]) == 800
    *maps, _ = drawn[0].axes  # the last one is the scale
    assert [axes.get_title() for axes in maps] == ["head 1", "head 2", "", ""]
    labels = [label.get_text() for label in maps[2].get_xticklabels()]
    assert labels[:9] == [*"From·the", "\\n"] and len(labels) == 14
    for axes in maps:
        weights = torch.from_numpy(axes.images[0].get_array().data)
        assert weights.dtype == torch.float32 and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(14))


def test_of_a_long_text_attention_is_drawn_on_what_the_context_holds(sample):
    pytest.importorskip("matplotlib")
    assert sample("--attention=x.svg").status == 0  # 41 tokens of 16
    assert "<svg" in Path("x.svg").read_text()


def test_without_matplotlib_attention_says_what_to_install(sample, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_sentence(sample("--attention=x.png"), 2, "pip install matplotlib")


def test_before_any_training_it_says_what_to_do(run):
    one_sentence(run("sample.py"), 1, "no best.pt under out/")


# ---- how it writes ----

def test_streamed_or_not_the_text_is_the_same(sample):
    """A batch is not streamed; its rows draw by --seed plus their number."""
    three = sample("--num_samples=3", "--seed=5").out.removesuffix("\n").split("\n----\n")
    alone = [sample(f"--seed={5 + row}").out.removesuffix("\n") for row in range(3)]
    assert three == alone


def test_a_sample_stops_before_the_stop_string_each_row_on_its_own(sample):
    whole = sample("--num_samples=4").out.removesuffix("\n").split("\n----\n")
    mark = whole[0][10:12]
    stopped = sample("--num_samples=4", f"--stop_at={mark}").out.removesuffix("\n")
    prompt = len("\n")
    expected = [text[:prompt] + text[prompt:].partition(mark)[0] for text in whole]
    assert stopped.split("\n----\n") == expected and len(set(map(len, expected))) > 1
    assert sample(f"--stop_at={mark}").out.removesuffix("\n") == expected[0]


def written(tokenizer, *texts, whole=True):
    """Texts, each written by itself up to eot if whole."""
    import sample as script
    all = [script.Text(tokenizer) for _ in texts]
    for text, content in zip(all, texts):
        for token in [*tokenizer.encode(content).tolist(), *[tokenizer.eot] * whole, None]:
            text.append(token)
    return all


def test_how_texts_ended_and_which_words_they_have():
    """Known answers: of 4 + 4 words and 3 + 3 pairs, "the cat" comes twice, "zat" is none."""
    import sample as script
    byte = ByteTokenizer()
    both = written(byte, "The cat sat. The", "the cat, zat it") + written(byte, "a", whole=False)
    known = {"the", "cat", "sat", "it"}.copy
    assert list(script.statistics(both, "", known)) == [
        "2 of 3 ended by themselves, after 16 tokens on average",
        "83.3% of 6 pairs of words are distinct",
        "87.5% of 8 words stand in the first 5M tokens of training"]
    assert list(script.statistics(both[:1], "", known)) == ["it ended by itself"]
    assert list(script.statistics(both[2:], "", known)) == []
    assert list(script.statistics(both, "", set))[2].startswith("the training text is not here")
    silent = written(CharTokenizer("ab"), "ab", "ba", whole=False)  # has no eot, and no whole word
    assert list(script.statistics(silent, "", known)) == []


def test_words_that_are_half_the_prompts_or_cut_off_do_not_count():
    import sample as script
    for prompt, texts, words in (
            ("Once upon a ti", ["me the cat's ca", "me it"], ["the", "cat's"]),
            ("I don'", ["t know.", "t. 'Oh' don'"], ["know", "oh"]),
            ("\u0130\u0130\u0130 ti", ["me 2nd éa b", "?"], ["2nd", "éa"])):
        texts, seen = written(ByteTokenizer(), *texts, whole=False), []

        class Known(set):
            def __contains__(self, word):
                return not seen.append(word)
        list(script.statistics(texts, prompt, lambda: Known("x")))
        assert seen == words


def test_a_word_that_stop_at_cuts_is_none(sample, monkeypatch):
    import sample as script
    monkeypatch.setattr(script, "stop_at", "he")
    texts = written(ByteTokenizer(), "a long time, the", "a time, zhe", whole=False)
    assert list(script.statistics(texts, "", {"a"}.copy))[1:] == [
        "100.0% of 3 pairs of words are distinct",
        "40.0% of 5 words stand in the first 5M tokens of training"]


def test_several_samples_are_held_to_the_words_of_the_training_text(sample):
    result = sample("--num_samples=3", "--stop_at=zzz")
    assert "0 of 3 ended by themselves\n" in result.err
    assert re.search(r"%.* of \d+ words stand in the first 5M tokens", result.err)
    assert "words" not in sample().err and "ended" not in sample().err  # which has no eot
    Path("data").rename("elsewhere")
    assert "the training text is not here" in sample("--num_samples=3").err


def test_a_prompt_of_one_blank_is_a_prompt(sample):
    assert sample("--start= ").out.startswith(" ")


def test_what_is_shown_of_a_growing_text_is_never_taken_back(run, monkeypatch):
    import sample as script
    monkeypatch.setattr(script, "stop_at", "END")
    text, shown = script.Text(ByteTokenizer()), ""
    for token in "ab é 漢 E EN EENDE".encode():
        shown += text.append(token)
        assert "ab é 漢 E EN E".startswith(shown)
    assert shown == "ab é 漢 E EN E" and text.ended and text.append(65) == text.append() == ""


def test_prompt_after_prompt(sample, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("From\nThat é\nThat\\n\n\nnever read\n"))
    result = sample("--interactive=True", "--temperature=0")
    assert result.status == 0 and "'é'" in result.err
    alone = [sample(f"--start={start}", "--temperature=0").out for start in ("From", "That\\n")]
    assert result.out == "".join(alone)


def test_prompts_in_another_encoding_are_told(sample, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    result = sample("--interactive=True")
    assert result.status == 1 and "Traceback" not in result.err and "utf-8" in result.err


def test_a_config_that_begins_with_other_weights_is_not_taken_for_its_run(sample):
    one_sentence(sample("--init_from=gpt2", "--out_dir=out/tiny"), 2,
                 "--init_from=gpt2 and --out_dir=out/tiny", "--init_from=resume")


def test_a_closed_pipe_is_no_error(sample):
    """As by head: the reader has gone before the text comes."""
    read, written = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, REPO / "sample.py", "--device=cpu"], stdout=written,
                            stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert result.returncode and result.stderr.strip() == "out/tiny/best.pt:"


def test_beams_write_one_text_without_draws(sample):
    assert sample("--num_beams=3", "--seed=1").out == sample("--num_beams=3", "--seed=2").out
    assert sample("--num_beams=3").out != sample("--num_beams=3", "--start=From").out


def test_compiled_the_text_is_the_same_and_no_new_length_is_compiled_anew(sample, monkeypatch):
    graphs, real = [], torch.compile
    monkeypatch.setattr("torch.compile", lambda function, **options: real(
        function, backend=lambda graph, _: graphs.append(graph) or graph.forward, **options))
    for options in ((), ("--num_samples=2",), ("--num_beams=2",)):
        torch.compiler.reset()
        graphs.clear()
        assert sample("--compile=True", *options).out == sample(*options).out
        assert len(graphs) == 2  # one more after a prompt of one token, which is its own case


def test_where_torch_compile_fails_the_text_comes_and_a_sentence_says_so(sample, monkeypatch):
    plain = sample()

    def broken(*_, **__):
        raise RuntimeError("no compiler")
    monkeypatch.setattr("torch.compile", broken)
    result = sample("--compile=true")
    assert result.out == plain.out
    assert "torch.compile does not work here (RuntimeError), going on without it" in result.err


@pytest.mark.parametrize("fastest", ["float32", "float16", "bfloat16"])
def test_auto_times_the_products_of_a_large_model(monkeypatch, fastest):
    import sample as script
    timed = []
    monkeypatch.setattr(script, "fastest", lambda trials: timed.extend(
        name for name in trials if trials[name]()) or fastest)
    large, small = (GPT(GPTConfig(8, 65, 4, 4, width)).eval() for width in (256, 64))
    for model_, rows in ((large, 3), (small, 1)):
        script.set_dtype(model_, "auto", torch.device("cpu"), rows)
    assert timed == ["float32", "float16", "bfloat16"] and small.wte.weight.dtype == torch.float32
    assert large.wte.weight.dtype == getattr(torch, fastest)
    assert large.wpe.weight.dtype == (torch.bfloat16 if fastest == "bfloat16" else torch.float32)


@pytest.mark.parametrize("dtype, largest", [("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 0.1)])
@pytest.mark.parametrize("changes", [{}, {"bias": False, "tied": False}])
def test_a_product_is_that_of_the_rounded_weights(dtype, largest, changes):
    """The oracle is float32's model with these weights; int8 also rounds what they multiply."""
    torch.manual_seed(1)
    exact = GPT(GPTConfig(32, 65, 2, 4, 128, **changes)).eval()
    for p in exact.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    rounded, packed = deepcopy(exact), deepcopy(exact)
    with torch.no_grad():
        model.use_product(packed, dtype)
        for name, w in rounded.named_parameters():
            matrix = w.dim() == 2 and name != "wpe.weight"
            if dtype == "int8" and matrix:
                scale = w.abs().amax(dim=1, keepdim=True) / 127
                w.copy_((w / scale).round() * scale)
            elif dtype == "bfloat16" or dtype == "float16" and matrix:
                w.copy_(w.to(getattr(torch, dtype)))
        x = torch.randint(65, (3, 32))
        expected = rounded(x)[0]
        assert (packed(x)[0].float() - expected).norm() < largest * expected.norm()
        torch.testing.assert_close(packed.wte(x).float(), rounded.wte(x), rtol=1e-6, atol=1e-6)
        assert not any(type(m) is torch.nn.Linear for m in packed.modules()) or dtype == "bfloat16"


def test_the_type_of_the_weights_is_a_choice(sample, monkeypatch):
    kinds = []
    stream = model.stream
    monkeypatch.setattr("model.stream", lambda model, *args, **options: kinds.append(
        (model.wpe.weight.dtype, type(model.lm_head).__name__)) or stream(model, *args, **options))
    texts = [sample(f"--dtype={dtype}", "--num_samples=2").out
             for dtype in ("auto", "float32", "bfloat16", "float16", "int8")]
    assert kinds == [(torch.float32, "Linear"), (torch.float32, "Linear"),
                     (torch.bfloat16, "Linear"), (torch.float32, "Float16Linear"),
                     (torch.float32, "Int8Linear")]
    assert texts[0] == texts[1] and all(len(text) > 40 for text in texts)
    assert sample("--dtype=int8", "--num_beams=2").status == 0


def test_int8_is_evaluated_but_not_trained_nor_on_a_gpu(run, train):
    train()
    given = ["--init_from=resume", "--eval_only=True"]
    losses = [float(train(f"--dtype={dtype}", *given).out.split("\n    val")[1].split()[1])
              for dtype in ("float32", "int8")]
    assert losses[1] != losses[0] == pytest.approx(losses[1], rel=0.01)
    one_sentence(train("--dtype=int8", "--out_dir=out/x"), 2, "--dtype=int8 cannot train")
    with pytest.raises(ValueError, match="--dtype=int8 is for --device=cpu"):
        model.use_product(GPT(GPTConfig(8, 65, 1, 4, 64)).to("meta"), "int8")
