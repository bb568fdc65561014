// An S3 server that keeps every key as it is, in memory, and checks no signature: folders are nothing but names to it,
// as to AWS, where versitygw has a file system's. Its argument is the address to listen at.
package main

import (
	"log"
	"net/http"
	"os"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

func main() {
	server := gofakes3.New(s3mem.New(), gofakes3.WithAutoBucket(true)).Server()
	log.Fatal(http.ListenAndServe(os.Args[1], server))
}
