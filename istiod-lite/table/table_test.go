package table

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

type row struct {
	Name string
	Tags []string
}

func TestDrainKnowsOnlyChanges(t *testing.T) {
	tab := New[string, row]()
	tab.Set("a", row{Name: "a"})
	tab.Set("b", row{Name: "b"})
	updated, removed := tab.Drain()
	if diff := cmp.Diff(map[string]row{"a": {Name: "a"}, "b": {Name: "b"}}, updated); diff != "" || removed != nil {
		t.Errorf("first drain: removed %v, updated (-want +got):\n%s", removed, diff)
	}
	if tab.Set("a", row{Name: "a"}) {
		t.Error("an equal value is no change")
	}
	if tab.Delete("c") {
		t.Error("deleting nothing is no change")
	}
	tab.Set("c", row{Name: "c"})
	tab.Delete("c")
	tab.Delete("b")
	updated, removed = tab.Drain()
	slices.Sort(removed)
	if diff := cmp.Diff([]string{"b", "c"}, removed); diff != "" || len(updated) != 0 {
		t.Errorf("second drain: updated %v, removed (-want +got):\n%s", updated, diff)
	}
}

func TestIndexFollowsRows(t *testing.T) {
	tab := New[string, row]()
	byTag := NewIndex(tab, func(r row) []string { return r.Tags })
	tab.Set("a", row{Name: "a", Tags: []string{"x", "y"}})
	tab.Set("b", row{Name: "b", Tags: []string{"x"}})
	names := func(tag string) []string {
		var out []string
		for _, r := range Sorted(byTag, tag) {
			out = append(out, r.Name)
		}
		return out
	}
	if diff := cmp.Diff([]string{"a", "b"}, names("x")); diff != "" {
		t.Error(diff)
	}
	tab.Set("a", row{Name: "a", Tags: []string{"y"}})
	tab.Delete("b")
	if got := names("x"); len(got) != 0 {
		t.Errorf("under x: %v, want none", got)
	}
	if diff := cmp.Diff([]string{"a"}, byTag.Keys("y")); diff != "" {
		t.Error(diff)
	}
}
