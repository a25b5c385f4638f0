//! The `pagecast` program.

fn main() -> std::process::ExitCode {
    pagecast::cli::run()
}
