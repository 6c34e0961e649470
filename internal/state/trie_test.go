package state

import (
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestTrie holds a trie to a map through random edits in batches, and old versions to what they were.
func TestTrie(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	type version struct {
		trie trie[int, int]
		want map[int]int
	}
	now := version{newTrie[int, int](), map[int]int{}}
	versions := []version{now}
	for range 200 {
		b := &batch{}
		next := version{now.trie, maps.Clone(now.want)}
		for range r.IntN(200) {
			key := r.IntN(2000)
			if r.IntN(2) == 0 {
				next.trie.remove(b, key)
				delete(next.want, key)
			} else {
				value := r.Int()
				next.trie.set(b, key, value)
				next.want[key] = value
			}
		}
		versions = append(versions, next)
		now = next
	}
	for i, v := range versions {
		if diff := cmp.Diff(v.want, maps.Collect(v.trie.all())); diff != "" {
			t.Fatalf("seed %d, version %d (-want +got):\n%s", seed, i, diff)
		}
		if v.trie.size != len(v.want) {
			t.Fatalf("seed %d, version %d: size %d, want %d", seed, i, v.trie.size, len(v.want))
		}
		for key := range 2000 {
			got, ok := v.trie.get(key)
			want, wantOK := v.want[key]
			if got != want || ok != wantOK {
				t.Fatalf("seed %d, version %d: get %d: %d %v, want %d %v", seed, i, key, got, ok, want, wantOK)
			}
		}
	}
}

// TestTrieCollisions works on one hash for several keys, and on hashes that part in their last bits only.
func TestTrieCollisions(t *testing.T) {
	var root *node[string, int]
	size := 0
	set := func(hash uint64, key string, value int) {
		added := false
		root = root.set(&batch{}, hash, 0, key, value, &added)
		if added {
			size++
		}
	}
	set(1, "a", 1)
	set(1, "b", 2)
	set(1|1<<63, "c", 3)
	set(1, "b", 4)
	before := root
	root = root.remove(&batch{}, 1, 0, "a")
	collect := func(n *node[string, int]) map[string]int {
		out := map[string]int{}
		n.each(func(k string, v int) bool { out[k] = v; return true })
		return out
	}
	if diff := cmp.Diff(map[string]int{"b": 4, "c": 3}, collect(root)); diff != "" {
		t.Errorf("after the removal (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]int{"a": 1, "b": 4, "c": 3}, collect(before)); diff != "" || size != 3 {
		t.Errorf("before it, %d added (-want +got):\n%s", size, diff)
	}
	root = root.remove(&batch{}, 1, 0, "b")
	if root = root.remove(&batch{}, 1|1<<63, 0, "c"); root != nil {
		t.Errorf("an emptied trie has nodes left: %v", root)
	}
}
