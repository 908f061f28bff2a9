//! What is different in two JSON texts, key by key.

use serde_json::Value;

/// Characters of a value that are shown.
const N_SHOWN: usize = 120;

/// Keys that writers of configurations set as they please: no reader computes with them.
const OF_THE_WRITER: [&str; 5] = [
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// Every key under `at` that is not as `expected`, with what was expected and what was found.
pub(crate) fn differences(at: &str, expected: &Value, found: &Value) -> Vec<String> {
    let mut told = Vec::new();
    compare(at, expected, found, &mut told);
    told
}

fn compare(at: &str, expected: &Value, found: &Value, told: &mut Vec<String>) {
    let (Value::Object(e), Value::Object(f)) = (expected, found) else {
        if expected != found {
            told.push(format!(
                "{at}: expected {}, found {}",
                shown(expected),
                shown(found)
            ));
        }
        return;
    };
    for (key, expected) in e {
        let at = join(at, key);
        match f.get(key) {
            Some(found) => compare(&at, expected, found, told),
            None => told.push(format!("{at}: expected {}, is not there", shown(expected))),
        }
    }
    for (key, found) in f.iter().filter(|(key, _)| !e.contains_key(*key)) {
        let at = join(at, key);
        told.push(format!("{at}: not expected, found {}", shown(found)));
    }
}

/// As [`differences`], of what both have: for files that another program wrote anew, with keys of
/// its own. Numbers are the same whatever they are written as.
pub(crate) fn shared_differences(at: &str, expected: &Value, found: &Value) -> Vec<String> {
    let (Value::Object(e), Value::Object(f)) = (expected, found) else {
        let is_same = expected == found
            || expected.as_f64().is_some_and(|e| Some(e) == found.as_f64())
            || expected.is_null()
            || found.is_null();
        let (expected, found) = (shown(expected), shown(found));
        let told = format!("{at}: expected {expected}, found {found}");
        return (!is_same).then_some(told).into_iter().collect();
    };
    let is_meant = |key: &&String| !OF_THE_WRITER.contains(&key.as_str());
    e.keys()
        .filter(is_meant)
        .filter_map(|key| Some((join(at, key), &e[key], f.get(key)?)))
        .flat_map(|(at, expected, found)| shared_differences(&at, expected, found))
        .collect()
}

fn join(at: &str, key: &str) -> String {
    match at.is_empty() {
        true => key.to_owned(),
        false => format!("{at}.{key}"),
    }
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(N_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_are_told_with_what_they_should_be() {
        let expected = json!({"a": {"b": 1, "c": [1, 2]}, "d": null});
        let found = json!({"a": {"b": 2, "e": true}, "d": null});
        let told = differences("x", &expected, &found);
        assert_eq!(
            told,
            [
                "x.a.b: expected 1, found 2",
                "x.a.c: expected [1,2], is not there",
                "x.a.e: not expected, found true"
            ]
        );
        assert!(differences("x", &expected, &expected).is_empty());
        let long = Value::String("ä".repeat(500));
        assert!(differences("", &long, &json!(1))[0].len() < 300);
    }

    #[test]
    fn of_anothers_file_only_what_both_have_counts() {
        let expected = json!({"eps": 1e-6, "n": 1, "dtype": "a", "only": 3, "t": {"k": 1}});
        let found = json!({"eps": 0.1, "n": 1.0, "dtype": "b", "more": 4, "t": {"k": 2}});
        assert_eq!(
            shared_differences("", &expected, &found),
            ["eps: expected 1e-6, found 0.1", "t.k: expected 1, found 2"]
        );
    }
}
