//! End to end: the program as a user runs it, in several processes on one machine.

mod capture;
mod convergence;
mod demo;
mod faults;
mod harness;
mod input;
mod migration;
mod mirror;
mod record;
mod replay;
mod unprivileged;
