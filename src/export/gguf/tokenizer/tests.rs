use super::*;
use serde_json::json;

fn tokenizer(main: Json, config: Json) -> Tokenizer {
    Tokenizer {
        dir: PathBuf::from("model"),
        path: PathBuf::from("model/tokenizer.json"),
        main,
        config,
    }
}

fn split(pattern: &str) -> Json {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})
}

fn main_of(pre: Json, ignores_merges: bool) -> Json {
    json!({"normalizer": {"type": "NFC"}, "pre_tokenizer": pre,
        "model": {"type": "BPE", "ignore_merges": ignores_merges,
            "vocab": {"a": 0, "b": 2}, "merges": [["a", " b"], "a b"]},
        "added_tokens": [{"id": 1, "content": "<end>", "special": true},
            {"id": 3, "content": "x\u{2581}y", "special": false},
            {"id": 4, "content": "<|im|>", "special": false}]})
}

#[test]
fn rules_are_told_by_what_they_are() {
    let name = |pre, ignores| tokenizer(main_of(pre, ignores), Json::Null).rules();
    for rules in &RULES {
        if let Step::Split(pattern) = rules.steps[0] {
            assert_eq!(
                name(split(pattern), rules.ignores_merges).unwrap(),
                rules.name
            );
            assert!(name(split(pattern), !rules.ignores_merges).is_err());
        }
    }
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
    assert_eq!(name(bytes.clone(), false).unwrap(), "gpt-2");
    let digits = json!({"type": "Digits", "individual_digits": true});
    let both = json!({"type": "Sequence", "pretokenizers": [digits, bytes]});
    assert_eq!(name(both, false).unwrap(), "smollm");
    let error = name(split("other"), false).unwrap_err().to_string();
    assert!(
        error.contains("tokenizer.json") && error.contains("other"),
        "{error}"
    );
}

#[test]
fn other_kinds_of_tokenizers_are_refused() {
    let Step::Split(pattern) = RULES[0].steps[0] else {
        unreachable!()
    };
    for (pointer, value) in [
        ("/model/type", json!("Unigram")),
        ("/model/byte_fallback", json!(true)),
        ("/normalizer", json!({"type": "Lowercase"})),
    ] {
        let mut main = main_of(split(pattern), false);
        main["model"]["byte_fallback"] = json!(false);
        *main.pointer_mut(pointer).unwrap() = value;
        let error = tokenizer(main, Json::Null).rules().unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{pointer}");
    }
}

#[test]
fn tokens_have_kinds_and_merges_no_inner_spaces() {
    let found = tokenizer(main_of(json!({}), false), Json::Null);
    let tokens = found.tokens(6).unwrap();
    assert_eq!(tokens.texts, ["a", "<end>", "b", "x y", "<|im|>", "[PAD5]"]);
    assert_eq!(
        tokens.kinds,
        [NORMAL, CONTROL, NORMAL, USER_DEFINED, CONTROL, UNUSED]
    );
    assert_eq!(found.merges().unwrap(), ["a \u{120}b", "a b"]);
    let error = found.tokens(4).err().unwrap().to_string();
    assert!(error.contains("vocab_size 4"), "{error}");
}

fn special(main: Json, config: Json, model: Json) -> Vec<(String, Value)> {
    tokenizer(main, config).special(&model).unwrap()
}

#[test]
fn special_tokens_come_from_both_configurations() {
    let main = json!({"added_tokens": [{"id": 7, "content": "<e>"}, {"id": 8, "content": "<p>"}]});
    let config = json!({"eos_token": {"content": "<e>"}, "pad_token": "<p>", "add_bos_token": true,
        "chat_template": [{"name": "default", "template": "T"},
            {"name": "to-ol", "template": "U"}]});
    let model = json!({"eos_token_id": 1, "text_config": {"bos_token_id": 5}});
    let expected = [
        ("tokenizer.ggml.bos_token_id", Value::U32(5)),
        ("tokenizer.ggml.eos_token_id", Value::U32(7)),
        ("tokenizer.ggml.padding_token_id", Value::U32(8)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.chat_template", "T".into()),
        ("tokenizer.chat_template.tool", "U".into()),
        (
            "tokenizer.chat_templates",
            Value::Texts(vec!["tool".into()]),
        ),
    ];
    let expected: Vec<_> = expected.map(|(key, value)| (key.to_owned(), value)).into();
    assert_eq!(special(main, config, model), expected);
}

#[test]
fn a_template_says_what_is_put_around_a_text() {
    let token = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let main = json!({"added_tokens": [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"},
            {"id": 3, "content": "<turn>"}],
        "post_processor": {"type": "TemplateProcessing",
            "single": [token("<s>"), text("A"), token("</s>")],
            "pair": [token("<s>"), text("A"), token("<s>"), text("B"), token("</s>")]}});
    let keys = special(main, json!({"eos_token": "<turn>"}), json!({}));
    let value = |key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        keys.iter()
            .find(|(k, _)| *k == key)
            .map(|(_, value)| value.clone())
    };
    assert_eq!(value("bos_token_id"), Some(Value::U32(1)));
    assert_eq!(value("eos_token_id"), Some(Value::U32(2)));
    assert_eq!(value("eot_token_id"), Some(Value::U32(3)));
    assert_eq!(value("add_bos_token"), Some(Value::Bool(true)));
    assert_eq!(value("add_eos_token"), Some(Value::Bool(true)));
    assert_eq!(value("add_sep_token"), Some(Value::Bool(false)));
}
