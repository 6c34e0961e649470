package state

import (
	"hash/maphash"
	"iter"
	"math/bits"
)

// trie is a persistent map: set and remove give a new map and leave the old one as it was, sharing all but the few
// nodes on the way to the key. So a snapshot is a copy of a pointer and a change costs what it changes, not the size
// of the mesh. Nodes made within one batch are changed in place by that batch (batch is their owner), so that loading
// many entries does not copy the same node for each.
type trie[K comparable, V any] struct {
	seed maphash.Seed
	root *node[K, V]
	size int
}

// batch owns the nodes made during one Apply. It must not be an empty struct: two of those may share an address.
type batch struct{ _ byte }

const (
	trieBits = 5
	trieMask = 1<<trieBits - 1
)

// node has one slot per bit set in bitmap, in bit order.
type node[K comparable, V any] struct {
	owner  *batch
	bitmap uint32
	slots  []slot[K, V]
}

// slot is either a deeper node or the entries of one hash (more than one only where the whole hash collides).
type slot[K comparable, V any] struct {
	deeper  *node[K, V]
	hash    uint64
	entries []entry[K, V]
}

type entry[K comparable, V any] struct {
	key   K
	value V
}

func newTrie[K comparable, V any]() trie[K, V] { return trie[K, V]{seed: maphash.MakeSeed()} }

func (t trie[K, V]) get(key K) (V, bool) {
	hash := maphash.Comparable(t.seed, key)
	n := t.root
	for shift := 0; n != nil; shift += trieBits {
		bit := uint32(1) << (hash >> shift & trieMask)
		if n.bitmap&bit == 0 {
			break
		}
		s := &n.slots[bits.OnesCount32(n.bitmap&(bit-1))]
		if s.deeper != nil {
			n = s.deeper
			continue
		}
		for i := range s.entries {
			if s.entries[i].key == key {
				return s.entries[i].value, true
			}
		}
		break
	}
	var zero V
	return zero, false
}

func (t *trie[K, V]) set(b *batch, key K, value V) {
	hash := maphash.Comparable(t.seed, key)
	added := false
	t.root = t.root.set(b, hash, 0, key, value, &added)
	if added {
		t.size++
	}
}

func (t *trie[K, V]) remove(b *batch, key K) {
	hash := maphash.Comparable(t.seed, key)
	if _, ok := t.get(key); !ok {
		return
	}
	t.root = t.root.remove(b, hash, 0, key)
	t.size--
}

// all yields every entry, in no particular order.
func (t trie[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) { t.root.each(yield) }
}

func (n *node[K, V]) each(yield func(K, V) bool) bool {
	if n == nil {
		return true
	}
	for i := range n.slots {
		if d := n.slots[i].deeper; d != nil {
			if !d.each(yield) {
				return false
			}
			continue
		}
		for _, e := range n.slots[i].entries {
			if !yield(e.key, e.value) {
				return false
			}
		}
	}
	return true
}

// editable is n, or a copy of it that the batch may change.
func (n *node[K, V]) editable(b *batch) *node[K, V] {
	if n == nil {
		return &node[K, V]{owner: b}
	}
	if n.owner == b {
		return n
	}
	// Room for one more: most edits that need a copy insert.
	slots := make([]slot[K, V], len(n.slots), len(n.slots)+1)
	copy(slots, n.slots)
	return &node[K, V]{owner: b, bitmap: n.bitmap, slots: slots}
}

func (n *node[K, V]) set(b *batch, hash uint64, shift int, key K, value V, added *bool) *node[K, V] {
	n = n.editable(b)
	bit := uint32(1) << (hash >> shift & trieMask)
	at := bits.OnesCount32(n.bitmap & (bit - 1))
	if n.bitmap&bit == 0 {
		*added = true
		n.bitmap |= bit
		n.slots = append(n.slots, slot[K, V]{})
		copy(n.slots[at+1:], n.slots[at:])
		n.slots[at] = slot[K, V]{hash: hash, entries: []entry[K, V]{{key, value}}}
		return n
	}
	s := &n.slots[at]
	switch {
	case s.deeper != nil:
		s.deeper = s.deeper.set(b, hash, shift+trieBits, key, value, added)
	case s.hash != hash:
		// Two hashes meet here: the one that was here moves a level down, and the new one beside it.
		below := (*node[K, V])(nil).editable(b)
		below.bitmap = 1 << (s.hash >> (shift + trieBits) & trieMask)
		below.slots = []slot[K, V]{{hash: s.hash, entries: s.entries}}
		*s = slot[K, V]{deeper: below.set(b, hash, shift+trieBits, key, value, added)}
	default:
		s.entries = setEntry(s.entries, key, value, added)
	}
	return n
}

// setEntry copies the entries with one set; there is one nearly always.
func setEntry[K comparable, V any](entries []entry[K, V], key K, value V, added *bool) []entry[K, V] {
	out := make([]entry[K, V], len(entries), len(entries)+1)
	copy(out, entries)
	for i := range out {
		if out[i].key == key {
			out[i].value = value
			return out
		}
	}
	*added = true
	return append(out, entry[K, V]{key, value})
}

// remove takes out a key that is there; an emptied node becomes nil.
func (n *node[K, V]) remove(b *batch, hash uint64, shift int, key K) *node[K, V] {
	n = n.editable(b)
	bit := uint32(1) << (hash >> shift & trieMask)
	at := bits.OnesCount32(n.bitmap & (bit - 1))
	s := &n.slots[at]
	if s.deeper != nil {
		if s.deeper = s.deeper.remove(b, hash, shift+trieBits, key); s.deeper != nil {
			return n
		}
	} else if len(s.entries) > 1 {
		left := make([]entry[K, V], 0, len(s.entries)-1)
		for _, e := range s.entries {
			if e.key != key {
				left = append(left, e)
			}
		}
		s.entries = left
		return n
	}
	n.bitmap &^= bit
	n.slots = append(n.slots[:at], n.slots[at+1:]...)
	// The slot beyond the end would otherwise keep the removed entry alive.
	n.slots[:len(n.slots)+1][len(n.slots)] = slot[K, V]{}
	if len(n.slots) == 0 {
		return nil
	}
	return n
}
