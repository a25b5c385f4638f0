#!/usr/bin/env perl
# Appends to random entries of a hash of up to 600,000 strings, and now and then goes through them in order.
use strict;
use warnings;

srand 1;
my %entries;
my $end = time + 200;
while (time < $end) {
    for (1 .. 2000) {
        my $key = int(rand(600000));
        $entries{$key} .= "x$key";
        $entries{$key} = "" if length($entries{$key}) > 60;
    }
    if (rand() < 0.002) {
        my $length = 0;
        for my $key (sort { $a <=> $b } keys %entries) {
            $length += length $entries{$key};
            last if $length > 3000000;
        }
    }
}
