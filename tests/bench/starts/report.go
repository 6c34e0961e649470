package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"
)

// write keeps the raw figures.
func (f figures) write(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(f, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// report prints a line for each round, and one for all rounds of a lane.
func (f figures) report(to io.Writer) error {
	table := tabwriter.NewWriter(to, 2, 0, 2, ' ', 0)
	fmt.Fprintf(table, "%d pods start at once\tload\tall run after\tone runs after: p50\tp99\tagent, own time: p50\tp99\twith the wait: p50\tp99"+
		"\tanswered: p50\tp99\tagent's CPU each\n", f.Pods)
	for _, l := range lanes {
		var sum round
		n := 0
		for _, r := range f.Rounds {
			if r.Lane != l.Name {
				continue
			}
			r.line(table, fmt.Sprintf("%s the mesh", l.Name), f.Pods)
			n++
			sum.Started, sum.Own = append(sum.Started, r.Started...), append(sum.Own, r.Own...)
			sum.Captured, sum.Answered = append(sum.Captured, r.Captured...), append(sum.Answered, r.Answered...)
			sum.All, sum.CPU, sum.Load = sum.All+r.All, sum.CPU+r.CPU, sum.Load+r.Load
		}
		if n == 0 {
			continue
		}
		sum.All, sum.CPU, sum.Load = sum.All/time.Duration(n), sum.CPU/time.Duration(n), sum.Load/float64(n)
		sum.line(table, "all of these", f.Pods)
		if l.Mode != "none" {
			fmt.Fprintf(table, "goal: own time p99 %v, %s\n", ownGoal, reached(at(sum.Own, 99) <= ownGoal))
		}
	}
	fmt.Fprintf(table, "\nthe agent has resident: %.1f MiB without these pods, %.1f MiB with %d captured (goal: %d MiB, %s)\n",
		float64(f.Before)/(1<<20), float64(f.Full)/(1<<20), fullNode, memoryGoal>>20, reached(f.Full <= memoryGoal))
	return table.Flush()
}

func (r round) line(to io.Writer, name string, pods int) {
	fmt.Fprintf(to, "%s\t%.0f\t%v\t%v\t%v", name, r.Load, r.All.Round(100*time.Millisecond), at(r.Started, 50), at(r.Started, 99))
	for _, times := range [][]time.Duration{r.Own, r.Captured, r.Answered} {
		if len(times) == 0 {
			fmt.Fprint(to, "\t–\t–")
			continue
		}
		fmt.Fprintf(to, "\t%v\t%v", at(times, 50), at(times, 99))
	}
	fmt.Fprintf(to, "\t%v\n", (r.CPU / time.Duration(pods)).Round(10*time.Microsecond))
}

// at is a percentile.
func at(times []time.Duration, percent int) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[(len(sorted)-1)*percent/100].Round(10 * time.Microsecond)
}

func reached(ok bool) string {
	if ok {
		return "reached"
	}
	return "not reached"
}
