//! The day of a template that asks for the day and has none of its own to fall back on.

use minijinja::{Error, ErrorKind};

/// `strftime_now` on 26 July 2024 at midnight: the day that Llama's templates, which test for the
/// function, fall back on. A prompt so stays the same from one day to the next.
pub(super) fn strftime_now(format: String) -> Result<String, Error> {
    let mut out = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match c {
            '%' => out.push_str(part(chars.next())?),
            plain => out.push(plain),
        }
    }
    Ok(out)
}

fn part(code: Option<char>) -> Result<&'static str, Error> {
    Ok(match code {
        Some('Y') => "2024",
        Some('y') => "24",
        Some('m') => "07",
        Some('B') => "July",
        Some('b' | 'h') => "Jul",
        Some('d' | 'e') => "26",
        Some('j') => "208",
        Some('A') => "Friday",
        Some('a') => "Fri",
        Some('F') => "2024-07-26",
        Some('H' | 'M' | 'S') => "00",
        Some('%') => "%",
        other => {
            let what = format!("strftime_now: unknown format %{}", other.unwrap_or(' '));
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_day_is_written_in_the_format_that_is_asked_for() {
        let day = |format: &str| strftime_now(format.to_owned());
        assert_eq!(day("%Y-%m-%d").unwrap(), "2024-07-26");
        assert_eq!(
            day("%A, %d %B %y, 100%%").unwrap(),
            "Friday, 26 July 24, 100%"
        );
        for unknown in ["%Q", "at %"] {
            let message = day(unknown).unwrap_err().to_string();
            assert!(message.contains("strftime_now"), "{message}");
        }
    }
}
