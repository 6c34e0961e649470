// Package kubedir (plumbing) stands in for the Kubernetes API where there is none: it lists and watches the objects in
// the YAML files of a directory. A *Dir hands out a cache.ListerWatcher per kind, so that informers run on a directory
// exactly as they run on an API server.
//
// Every file of the directory itself whose name ends in .yaml, .yml or .json and does not begin with a dot is read;
// files may hold several documents, and file names carry no meaning except that of two objects with one name the one
// in the first file (by name order) counts. Objects of namespaced kinds without a namespace are in "default". A file that
// cannot be read or understood is reported with its line, and the objects it held before stay as they were.
package kubedir
