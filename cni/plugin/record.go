package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
)

// Record is what the agent last knew of the mesh on its node. It is on the node's disk, so that after a reboot, when the
// agent or the API server is not there yet, pods of the mesh are held and others are not.
type Record struct {
	// Namespaces are those whose pods are in the mesh unless Pods says otherwise.
	Namespaces []string
	// Single are those, not of the mesh themselves, in which a pod of this node was once labelled by itself, so that the next may be.
	Single []string `json:",omitempty"`
	// Pods tells of each pod of the node, by the UID that a runtime gives for it, whether it is in the mesh.
	Pods map[string]bool
}

// ReadRecord reads a record; without one, ok is false.
func ReadRecord(path string) (r Record, ok bool, err error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return Record{}, false, fmt.Errorf("read the record of the mesh: %w", err)
	}
	return r, true, nil
}

// Outside tells whether a pod is known to be none of the mesh's. A pod that the agent has never seen is judged by its
// namespace.
func (r Record) Outside(namespace, uid string) bool {
	if member, known := r.Pods[uid]; known {
		return !member
	}
	return !slices.Contains(r.Namespaces, namespace) && !slices.Contains(r.Single, namespace)
}
