package xds

import "maps"

// collection is the resources of one type in one scope, and the order in which they changed, so that what a client
// has missed since its last push is found without looking at the rest.
type collection struct {
	resources map[string]Resource
	aliases   map[string]string // alias → name
	// log holds the names of changed resources; log[i] is change number first+i. It is cut short when it has grown
	// beyond twice the collection: who is further behind compares everything.
	log   []string
	first uint64
}

// newCollection starts at a change number that no earlier collection of its scope has reached.
func newCollection(first uint64) *collection {
	return &collection{first: first, resources: map[string]Resource{}, aliases: map[string]string{}}
}

// now is the number of the next change.
func (c *collection) now() uint64 { return c.first + uint64(len(c.log)) }

// set adds or replaces a resource and tells whether that changed anything.
func (c *collection) set(r Resource) bool {
	if r.Version == "" {
		r.Version = contentVersion(r)
	}
	old, ok := c.resources[r.Name]
	if ok && old.Version == r.Version {
		return false
	}
	c.dropAliases(old)
	c.resources[r.Name] = r
	for _, alias := range r.Aliases {
		c.aliases[alias] = r.Name
	}
	c.note(r.Name)
	return true
}

// remove takes a resource out and tells whether it was there.
func (c *collection) remove(name string) bool {
	old, ok := c.resources[name]
	if !ok {
		return false
	}
	c.dropAliases(old)
	delete(c.resources, name)
	c.note(name)
	return true
}

func (c *collection) dropAliases(r Resource) {
	for _, alias := range r.Aliases {
		if c.aliases[alias] == r.Name {
			delete(c.aliases, alias)
		}
	}
}

func (c *collection) note(name string) {
	c.log = append(c.log, name)
	if len(c.log) > 2*len(c.resources)+1024 {
		cut := len(c.log) / 2
		c.first += uint64(cut)
		c.log = append([]string(nil), c.log[cut:]...)
	}
}

// since are the names that changed from change number from on; ok is false where that is too long ago to tell.
func (c *collection) since(from uint64) (names map[string]struct{}, ok bool) {
	if from < c.first || from > c.now() {
		return nil, false
	}
	names = make(map[string]struct{}, c.now()-from)
	for _, name := range c.log[from-c.first:] {
		names[name] = struct{}{}
	}
	return names, true
}

// resolve finds a resource by name or alias.
func (c *collection) resolve(name string) (Resource, bool) {
	if r, ok := c.resources[name]; ok {
		return r, true
	}
	r, ok := c.resources[c.aliases[name]]
	return r, ok
}

// names are the names of all resources.
func (c *collection) names() map[string]struct{} {
	out := make(map[string]struct{}, len(c.resources))
	for name := range maps.Keys(c.resources) {
		out[name] = struct{}{}
	}
	return out
}
