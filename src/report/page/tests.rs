use super::*;
use crate::report::importance::{
    ImportanceFile, KeptWeights, SCHEMA, ShownImage, ShownSample, TokenGrid, TokenRun,
};
use serde_json::json;

/// What every text that a page shows may be, to break out of where it stands.
const HOSTILE: &str = "</script><img src=x onerror=alert(1)>'\"&`|${{1234*4321}}";

fn report() -> RunReport {
    let scheme = |bits: u8| json!({"bits": bits, "group_size": 8, "symmetric": false, "scale_dtype": "bf16"});
    let module = |layer: usize, role: &str, bits: u8, loss: f64| {
        json!({
            "name": format!("model.layers.{layer}.{role}"), "layer_idx": layer, "shape": [4, 8],
            "scheme": scheme(bits), "relative_loss": loss / 100.0, "loss": loss,
            "nearest_loss": 4.0, "dampening_frac": 0.01, "alpha": 1.0, "n_dead_columns": 0,
            "effective_sample_size": 6.0 + loss,
            "weight_share": match layer { 0 => json!(null), _ => json!({"vision": 0.25, "answer": 0.75}) },
        })
    };
    let report = json!({
        "schema": 1, "vlmq": "0.1.0", "method": "vlmq", "command": "vlmq quantize m --output o",
        "source": {"name": "m", "model_type": "qwen2_vl", "tensor_bytes": 4_000_000_000u64},
        "output": {"format": "compressed-tensors", "tensor_bytes": 1_000_000_000u64},
        "settings": {"alpha": 1.0, "importance": {"power": 1.0, "quantile": null}},
        "calibration": {
            "n_samples": 2, "n_sequences": 2, "seed": 7, "n_tokens": {"vision": 6, "answer": 2},
        },
        "modules": [
            module(0, "self_attn.q_proj", 3, 1.0), module(0, "mlp.down_proj", 4, 2.0),
            module(1, "self_attn.q_proj", 3, 3.0), module(1, "mlp.down_proj", 4, 5.0),
        ],
        "deviations": [
            {"kind": "few_tokens", "module": "model.layers.0.self_attn.q_proj",
             "effective_sample_size": 7.0, "in_features": 8},
            {"kind": "idle_rule", "pattern": "visual.*|x"},
        ],
        "seconds": {"solve": 3.0, "forward": 1.0, "total": 5.0}, "peak_memory_bytes": 2_500_000_000u64,
    });
    serde_json::from_value(report).unwrap()
}

fn importance(text: &str) -> ImportanceFile {
    let run = |class: &str, n_tokens: usize, texts: &[&str]| TokenRun {
        class: class.into(),
        n_tokens,
        texts: texts.iter().map(|text| (*text).into()).collect(),
    };
    let grids = vec![TokenGrid {
        rows: 1,
        cols: 2,
        area: [0.0, 0.0, 1.0, 1.0],
    }];
    let image = |grids| ShownImage {
        png: "AAAA".into(),
        width: 8,
        height: 4,
        n_tokens: 2,
        grids,
    };
    ImportanceFile {
        schema: SCHEMA,
        samples: vec![ShownSample {
            id: text.into(),
            images: vec![image(grids), image(Vec::new())],
            runs: vec![run("vision", 4, &[]), run("answer", 1, &[text])],
        }],
        layers: vec![
            Vec::new(),
            vec![KeptWeights::of(
                "self_attn.q_proj",
                &[vec![0.5, 1.0, 2.0, 1.0, 4.0]],
                &[0],
            )],
        ],
    }
}

fn answers(text: &str) -> Answers {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("predictions.json");
    let row = |answer: &str, correct: bool| json!({"id": text, "category": null, "answer": answer, "expected": [text], "correct": correct});
    let texts = json!([{"id": "t", "n_tokens": 1, "negative_log_likelihood": 0.0}]);
    let read = |rows| {
        let tasks = json!({text: [rows], "wiki": texts});
        std::fs::write(&file, tasks.to_string()).unwrap();
        Predictions::read(&file).unwrap()
    };
    Answers::new(read(row(text, false)), Some(read(row("", true))))
}

/// Every text of a page replaced by one that wants out.
fn hostile_report() -> RunReport {
    let mut report = report();
    report.method = HOSTILE.into();
    report.command = Some(HOSTILE.into());
    report.settings = json!({HOSTILE: HOSTILE});
    report.source.as_mut().unwrap().name = HOSTILE.into();
    report.output.as_mut().unwrap().format = HOSTILE.into();
    for module in &mut report.modules {
        module.name = format!("model.layers.{}.{HOSTILE}", module.layer_idx);
    }
    report.deviations = vec![Deviation::Skipped {
        module: HOSTILE.into(),
    }];
    report
}

#[test]
fn no_text_gets_out_of_its_place() {
    let (report, file, answers) = (hostile_report(), importance(HOSTILE), answers(HOSTILE));
    let page = Page::new(HOSTILE, &report, Some(&file)).with_answers(&answers);
    let html = page.html();
    assert!(!html.contains("<img src=x"), "a tag came through");
    assert!(html.matches("onerror=alert(1)&gt;").count() > 10);
    // The page's own two scripts end, and nothing else.
    assert_eq!(html.matches("</script").count(), 2);
    assert!(
        !html.contains("5332114"),
        "a template inside of a text was carried out"
    );
    let start = html.find("id=\"importance\">").unwrap() + "id=\"importance\">".len();
    let data = &html[start..start + html[start..].find("</script>").unwrap()];
    let data: serde_json::Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["samples"][0]["runs"][1]["texts"][0], HOSTILE);
    let markdown = page.markdown();
    let (fenced, _) = markdown.split_once("## Answers").unwrap();
    let outside = markdown.replace(&fenced[fenced.find("```").unwrap()..], "");
    assert!(!outside.contains("<img"), "{outside}");
    assert!(
        outside.contains("&lt;img src=x onerror=alert(1)>"),
        "{outside}"
    );
}

/// What the page asks a browser for: nothing that is not in it.
#[test]
fn nothing_is_outside_of_the_page() {
    let (report, file, answers) = (report(), importance("yes"), answers("yes"));
    let html = Page::new("o", &report, Some(&file))
        .with_answers(&answers)
        .html();
    for (attribute, allowed) in [("src=\"", "data:"), ("href=\"", "#")] {
        for (at, _) in html.match_indices(attribute) {
            let value = &html[at + attribute.len()..];
            assert!(
                value.starts_with(allowed) || value.starts_with("data:"),
                "{value:.40}"
            );
        }
    }
    for other in ["http://", "https://", "url(", "@import", "{{", "{%"] {
        assert!(!html.contains(other), "{other}");
    }
}

#[test]
fn the_page_tells_what_the_report_knows() {
    let (report, file, answers) = (report(), importance("yes"), answers("yes"));
    let html = Page::new("o", &report, Some(&file))
        .with_answers(&answers)
        .html();
    for told in [
        "25 % of 4.00 GB",
        "1.00 GB",
        "2.50 GB",
        "5.0 s",
        // Codes of 3 and 4 bits, 19 and 20 bits more for every 8 of them.
        "5.94",
        // Losses of 11 against 16.
        "69 %",
        "3 bits, groups of 8, asymmetric (q); 4 bits, groups of 8, asymmetric (down)",
        "vlmq quantize m --output o",
        "importance.power",
        "7 effective tokens for 8 inputs",
        "visual.*|x",
        "image 1, row 1, column 2",
        "image 2, token 2",
        "(fewer than inputs)",
        "(more than rounding)",
        "not drawn over it",
    ] {
        assert!(html.contains(told), "{told} is not told");
    }
    assert!(!html.contains("quantile"), "what is not set is no setting");
}

#[test]
fn what_a_report_lacks_is_left_out_or_said() {
    let bare = RunReport {
        method: "rtn".into(),
        ..RunReport::default()
    };
    let html = Page::new("o", &bare, None).html();
    assert!(
        html.contains("looks at no samples"),
        "why there are no pictures"
    );
    assert!(html.contains("Nothing: every module was quantized"));
    for absent in [
        "id=\"losses\"",
        "id=\"answers\"",
        "id=\"bits\"",
        "<script",
        "NaN",
    ] {
        let body = html.split("</style>").nth(1).unwrap();
        assert!(!body.contains(absent), "{absent}");
    }
    // Of a run without --report there are losses, but nothing to hold them against.
    let mut older = report();
    older.modules.iter_mut().for_each(|m| m.nearest_loss = None);
    let html = Page::new("o", &older, None).html();
    assert!(html.contains("was not measured"));
    assert!(html.contains("kept no token weights"));
}

#[test]
fn markdown_is_as_agreed() {
    let (report, answers) = (report(), answers("a_b"));
    let page = Page::new("o", &report, None).with_answers(&answers);
    let golden = include_str!("golden.md");
    assert_eq!(page.markdown(), golden);
}

#[test]
fn experts_share_a_column() {
    assert_eq!(role("model.layers.3.self_attn.q_proj"), "q");
    assert_eq!(
        role("model.layers.3.mlp.experts.12.gate_proj"),
        "expert gate"
    );
    let mut report = report();
    for (i, module) in report.modules.iter_mut().enumerate() {
        module.layer_idx = 0;
        module.name = format!("model.layers.0.mlp.experts.{i}.up_proj");
    }
    let found = serde_json::to_value(maps::bits(&report)).unwrap();
    assert_eq!(found["columns"], json!(["expert up"]));
    assert_eq!(found["rows"][0]["cells"][0]["text"], "3.5");
    // The least of them.
    let found = serde_json::to_value(maps::sample_sizes(&report)).unwrap();
    assert_eq!(found["rows"][0]["cells"][0]["text"], "7");
}

#[test]
fn numbers_are_short() {
    assert_eq!(
        [0.0, 0.001, 0.05, 0.5, 2.0].map(percent),
        ["0 %", "0.10 %", "5.0 %", "50 %", "200 %"]
    );
    assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
    assert_eq!(grouped(12), "12");
}
