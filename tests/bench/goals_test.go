package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fairlead-mesh/fairlead/tests/bench/load"
)

func TestGoalTable(t *testing.T) {
	w := &world{}
	f := figures{
		runs: []run{
			{Test: "bulk1", Lane: "fairlead", Result: load.Result{Units: 1e9, Rate: 1.3e9 / 8}, CPU: []float64{0.4, 0.5}},
			{Test: "bulk1", Lane: "ztunnel", Result: load.Result{Units: 1e9, Rate: 1e9 / 8}, CPU: []float64{0.5, 0.5}},
		},
		memory: []memory{{Lane: "fairlead", Connections: 1250, Idle: []float64{7, 18}, Few: []float64{20, 20}, Open: []float64{21, 21}}},
	}
	table := w.goalTable(f)
	for _, row := range []string{
		"| bulk1, CPU s/GB | 0.900 | 1.00 ztunnel | ≤ 0.85× | 0.90× | **not reached** |",
		"| bulk1, Gbit/s | 1.30 | 1.00 ztunnel | ≥ 1.2× | 1.30× | reached |",
		"| memory, idle MiB | 18.0 | | ≤ 17 | | **not reached** |",
		"| memory, KiB an idle connection | 1.02 | | ≤ 2 | | reached |",
	} {
		if !strings.Contains(table, row+"\n") {
			t.Errorf("no row %q in\n%s", row, table)
		}
	}
	if strings.Contains(table, "bulk8") {
		t.Error("something is said of what was not measured")
	}
	if w.goalTable(figures{}) != "" {
		t.Error("something is said of nothing")
	}
}

func TestWriteDocument(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(path, []byte("before\n"+figuresBegin+"old\n"+figuresEnd+"\nafter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := writeDocument(path, "new\n"); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := "before\n" + figuresBegin + "new\n" + figuresEnd + "\nafter\n"; string(got) != want {
		t.Errorf("the document is\n%s", got)
	}
	if err := os.WriteFile(path, []byte("no place"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeDocument(path, "new"); err == nil {
		t.Error("a document without a place for figures was written to")
	}
}
